"""The stages of a run, one fit each, and all that one leaves to the next.

A stage is the run's config with some overrides, which :func:`qtrain.config.compose.compose` works out before anything
runs. What passes from stage to stage is a :class:`StageState` and nothing else, written to a file when a stage ends, so
that a killed run goes on in the stage where it was.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from qtrain.convert.inherit import StudentState
from qtrain.pipeline.run_folder import STAGES
from qtrain.spec import Position
from qtrain.utils.atomic_write import atomic_write

log = logging.getLogger(__name__)

STATE = "state.pt"


@dataclass(frozen=True)
class StageState:
    """What a finished stage leaves: the student, a teacher that learned, the objective's own parameters, and metrics.

    ``teacher_model`` is the config of the teacher whose weights ``teacher`` are. ``metrics`` are numbers per layer that
    callbacks found, by the callback's name: how unstable each is. ``train_s`` are seconds of training, of all stages
    so far; ``distill`` the terms that looked at a teacher.
    """

    student: StudentState
    end: Position
    objective: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] | None = None
    teacher: dict[str, Tensor] | None = None
    teacher_model: dict[str, Any] | None = None
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    train_s: float = 0.0
    distill: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stage:
    """One fit of a run: its name ("" where the run has only one), its config, and the folder of its own files."""

    name: str
    cfg: DictConfig
    folder: Path

    @property
    def path(self) -> Path:
        """Where the state lies once the stage has ended."""
        return self.folder / STATE

    def save(self, state: StageState, *, finished: bool = True) -> None:
        """Keep ``state``; the stage then counts as finished, and its resume points go.

        Where the run has yet to make something of it, ``finished`` is false: killed, it needs the points again.
        """
        plain = {**vars(state), "student": vars(state.student), "end": tuple(state.end)}
        with atomic_write(self.path) as temporary:
            torch.save(plain, temporary)
        if finished:
            shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)

    def load(self) -> StageState | None:
        """The state that the stage has left, or ``None`` where it has not ended, or its file is damaged."""
        if not self.path.is_file():
            return None
        try:
            plain = torch.load(self.path, map_location="cpu", weights_only=True)
            return StageState(**{**plain, "student": StudentState(**plain["student"]), "end": Position(*plain["end"])})
        except Exception as error:  # torch.load raises almost anything for a damaged file
            log.warning("%s is damaged (%s); the stage runs again", self.path, type(error).__name__)
            return None


def stages_of(cfg: DictConfig, folder: Path) -> list[Stage]:
    """The stages of a run in order; without ``cfg.stages`` the run itself is the only one."""
    if not cfg.get("stages"):  # a run of an earlier version has no such key
        return [Stage("", cfg, folder)]
    return [
        Stage(str(name), _with(cfg, changes), folder / STAGES / f"{number}-{name}")
        for number, (name, changes) in enumerate(cfg.stages.items(), start=1)
    ]


def last_stage(cfg: DictConfig) -> DictConfig:
    """The config of the stage that makes the final student; ``cfg`` itself where there are no stages."""
    return stages_of(cfg, Path())[-1].cfg


def _with(cfg: DictConfig, changes: Mapping[str, Any]) -> DictConfig:
    plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    return OmegaConf.create({**plain, **OmegaConf.to_container(changes, resolve=True), "stages": {}})  # type: ignore[dict-item]
