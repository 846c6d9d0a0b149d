"""The stages of a run, one fit each, and all that one leaves to the next.

A stage is the run's config with some overrides, composed before anything runs. What passes from stage to stage is a
:class:`StageState` and nothing else, written to a file when a stage ends, so that a killed run goes on in the stage
where it was.
"""

import logging
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qtrain.convert.inherit import StudentState
from qtrain.settings.run_files import STAGES
from qtrain.settings.run_settings import RunSettings
from qtrain.spec import Allocation, Position
from qtrain.utils.atomic_write import atomic_write

log = logging.getLogger(__name__)

STATE = "state.pt"


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict of ``module`` on the CPU."""
    return {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}


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

    def after(self, before: "StageState | None") -> "StageState":
        """This state with what it hands on of the stage ``before``: a teacher and metrics that it did not change."""
        if before is None:
            return self
        return replace(
            self,
            teacher=before.teacher if self.teacher is None else self.teacher,
            teacher_model=before.teacher_model if self.teacher is None else self.teacher_model,
            metrics={**before.metrics, **self.metrics},
            train_s=before.train_s + self.train_s,
            distill=tuple(dict.fromkeys((*before.distill, *self.distill))),
        )


@dataclass(frozen=True)
class Stage:
    """One fit of a run: its name ("" where the run has only one), its config, and the folder of its own files."""

    name: str
    settings: RunSettings
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


@dataclass(frozen=True)
class StageResult:
    """A stage that has run: its student, what it leaves to the next one, and how its fit went.

    ``allocation`` are the bits of the student's layers; ``device`` is what the fit ran on. ``earlier_s`` are seconds of
    training before this process began, ``resumed`` says that there were some. ``calibrated`` is the student as
    calibration left it, where no earlier stage had changed its weights.
    """

    student: nn.Module
    state: StageState
    device: torch.device
    allocation: Allocation = field(default_factory=dict)
    earlier_s: float = 0.0
    resumed: bool = False
    calibrated: nn.Module | None = None


def stages_of(settings: RunSettings, folder: Path) -> list[Stage]:
    """The stages of a run in order; without ``settings.stages`` the run itself is the only one."""
    if not settings.stages:
        return [Stage("", settings, folder)]
    return [
        Stage(name, own, folder / STAGES / f"{number}-{name}")
        for number, (name, own) in enumerate(settings.stages.items(), start=1)
    ]
