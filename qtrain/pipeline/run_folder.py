"""What a run leaves in its folder: config, summary, results row. Written by tasks, never by hand."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.utilities import rank_zero_only
from safetensors.torch import save_file
from torch import nn

from qtrain.cost.count import CostReport
from qtrain.pipeline.results import append_row, config_hash, provenance
from qtrain.pipeline.summary import FINISHED, SUMMARY, RunSummary, read_summary, write_summary
from qtrain.settings.run_identity import identifying, plain_config
from qtrain.spec import FULL_PRECISION, Allocation, DataInfo
from qtrain.tracking.wandb_client import RUN_ID
from qtrain.utils.atomic_write import atomic_write, write_text
from qtrain.utils.errors import ConfigError

CONFIG = "config.yaml"
STAGES = "stages"
"""Folder of what each stage of a run keeps."""

STUDENT = "student.safetensors"
"""A trained student's parameters, scales and code ranges, under the names of its state dict."""


def identity_of(cfg: DictConfig) -> str:
    """A hash that two configs share exactly if a run of one may go on as a run of the other."""
    return config_hash(identifying(plain_config(cfg)))


def claim_folder(cfg: DictConfig, folder: Path) -> RunSummary | None:
    """Make ``folder`` this run's, or return what :func:`finished_run` does, and raise what it raises."""
    if (finished := finished_run(cfg, folder)) is None:
        _make_ready(cfg, folder)
    return finished


def finished_run(cfg: DictConfig, folder: Path) -> RunSummary | None:
    """The summary of the run of this very config that has finished in ``folder``, where nothing is written.

    Raises ``ConfigError`` where it holds a run of another config and ``cfg.overwrite`` is false.
    """
    if (folder / CONFIG).is_file() and not cfg.overwrite:
        before = OmegaConf.load(folder / CONFIG)
        same = isinstance(before, DictConfig) and identity_of(before) == identity_of(cfg)
        # A run that failed before its first resume point has nothing to lose, and must not block its folder.
        begun = (folder / SUMMARY).is_file() or any(folder.glob("checkpoints/*.ckpt")) or (folder / STAGES).is_dir()
        if not same and begun:
            raise ConfigError(
                f"run_dir: {folder} holds a run of another config; choose another name=..., or overwrite=true to "
                "replace it"
            )
        if same and (folder / SUMMARY).is_file():
            summary = read_summary(folder / SUMMARY)
            if summary.status == FINISHED:
                return summary
    return None


@rank_zero_only
def _make_ready(cfg: DictConfig, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if cfg.overwrite or not cfg.resume:
        for stale in (*folder.glob("checkpoints/*.ckpt"), folder / SUMMARY, folder / "metrics.jsonl", folder / RUN_ID):
            stale.unlink(missing_ok=True)
        shutil.rmtree(folder / STAGES, ignore_errors=True)
    # Whole at once: other ranks look into it.
    write_text(folder / CONFIG, OmegaConf.to_yaml(OmegaConf.create(plain_config(cfg))))


def describe(cfg: DictConfig, info: DataInfo, allocation: Allocation, cost: CostReport) -> dict[str, Any]:
    """The fields of a summary that do not depend on how training went."""
    weight, input = typical_bits(allocation)
    return {
        "experiment": cfg.experiment,
        "dataset": info.name,
        "model": cfg.model.name,
        "quantizer": _quantizer_name(cfg) if allocation else None,
        "w_bits": weight,
        "a_bits": input,
        "seed": cfg.seed,
        **cost.as_dict(),
    }


def append_results(
    cfg: DictConfig, folder: Path, summary: Mapping[str, Any], *, device: torch.device, notes: str
) -> None:
    """One row to the run's own ``results.csv``, and to ``cfg.results`` where that names a file."""
    row = {
        **provenance(device),
        "config_hash": identity_of(cfg),
        "task": cfg.task,
        "notes": notes,
        **{key: value for key, value in summary.items() if key not in ("layers", "status")},
    }
    for path in {folder / "results.csv", *([Path(cfg.results)] if cfg.results else [])}:
        append_row(path, row)


@rank_zero_only
def save_weights(model: nn.Module, path: Path) -> None:
    """The state dict of ``model`` as safetensors; ``path`` appears when all of it is written."""
    with atomic_write(path) as temporary:
        save_file({name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}, temporary)


def finish(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write ``summary.json``, after which the run counts as finished."""
    write_summary(folder, summary)


def typical_bits(allocation: Allocation) -> tuple[int, int]:
    """The weight and input bits that most layers have; full precision for an empty allocation."""
    pairs = list(allocation.values())
    typical = max(pairs, key=pairs.count) if pairs else (FULL_PRECISION, FULL_PRECISION)
    return typical[0], typical[1]


def _quantizer_name(cfg: DictConfig) -> str:
    names = [str(node["_target_"]).rpartition(".")[2].lower() for node in (cfg.quantize.weight, cfg.quantize.input)]
    return "/".join(dict.fromkeys(names))
