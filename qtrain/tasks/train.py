"""The task that makes a low-bit student: load, convert, calibrate, distill, evaluate, record."""

from __future__ import annotations

import copy
import logging
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only
from torch import nn

from qtrain.config.instantiate import instantiate
from qtrain.cost.count import CostReport
from qtrain.data.base import VisionData
from qtrain.data.image_grid import keep_picture
from qtrain.pipeline import prepare, run_folder
from qtrain.pipeline.build_model import build_model
from qtrain.pipeline.claim import claimed
from qtrain.pipeline.costs import costs
from qtrain.pipeline.fit import named_callbacks
from qtrain.pipeline.load_data import depends_on, load_data
from qtrain.pipeline.pretrain import full_precision_weights, must_train
from qtrain.pipeline.run_cache import cached
from qtrain.pipeline.run_stage import Trained, run_stage
from qtrain.pipeline.stages import Stage, StageState, stages_of
from qtrain.pipeline.summary import FINISHED, RunSummary
from qtrain.report.table import print_summary
from qtrain.tracking.metric_log import MetricLog
from qtrain.tracking.run_tracking import open_loggers, tell_outcome, tell_source, tell_student
from qtrain.training.callbacks.batchnorm import reestimate_batchnorm
from qtrain.training.evaluation import evaluate

log = logging.getLogger(__name__)


def run(cfg: DictConfig, *, keep_last: bool = False, show: bool = True) -> dict[str, Any]:
    """Train one student; returns ``top1``, ``fp_top1`` and ``ptq_top1`` in percent (``None`` without a final test).

    A finished run of the same config is not repeated, only shown. With ``keep_last`` the state of the last stage is
    kept as those before it are, so that a run of more stages may go on from it. ``show`` prints it beside the others of
    its experiment.
    """
    folder = Path(cfg.run_dir)
    with claimed(cfg, folder) as finished:
        if finished is not None:
            return _shown(finished, folder, show)
        with open_loggers(cfg, folder) as loggers:
            metrics = _train(cfg, folder, loggers, keep_last=keep_last)
        if show:
            _show(folder)
        return metrics


def _shown(finished: RunSummary, folder: Path, show: bool) -> dict[str, Any]:
    log.info("%s is finished; overwrite=true runs it again", folder)
    if show:
        print_summary(folder.parent)
    return {"top1": finished.top1, "fp_top1": finished.fp_top1, "ptq_top1": finished.ptq_top1}


def _train(cfg: DictConfig, folder: Path, loggers: tuple[Logger, ...], *, keep_last: bool = False) -> dict[str, Any]:
    start = time.perf_counter()
    torch.manual_seed(cfg.seed)

    data = load_data(cfg)
    keep_picture(data, folder)
    stages = stages_of(cfg, folder)
    # With the weights at hand the conversion itself is next, and in later stages it comes soon.
    rehearsed = cfg.quantize.enabled and must_train(cfg.model, cfg, data)
    for stage in stages:
        _check(stage.cfg)
        if rehearsed:
            prepare.rehearse(stage.cfg, data)
    # A full-precision run starts from what its config names, a quantized one from trained weights in any case.
    weights = full_precision_weights(cfg.model, cfg, data) if cfg.quantize.enabled else None
    full_precision = cached(
        "model", {**depends_on(cfg), "weights": weights}, lambda: build_model(cfg.model, data.info, weights=weights)
    )
    tell_source(loggers, weights)
    ended = _fit_stages(cfg, stages, full_precision, data, folder, loggers)
    if keep_last:
        _keep(stages[-1], ended.last.state, finished=False)

    last = ended.last
    student, fitted, final = last.prepared.student, last.fitted, stages[-1].cfg
    if final.fit.reestimate_bn:
        _reestimate_batchnorm(final, student.to(fitted.device), data, fitted.device)
    metrics: dict[str, Any] = {"top1": None, "fp_top1": None, "ptq_top1": None}
    if cfg.fit.final_test:
        models = {"fp_top1": full_precision, "top1": student}
        if last.prepared.allocation:
            calibrated = ended.calibrated
            if calibrated is None:
                calibrated = prepare.quantize(final, copy.deepcopy(full_precision), data).student
            models["ptq_top1"] = calibrated
        for name, model in models.items():
            metrics[name] = evaluate(model, data.test_dataloader(), fitted.device)["top1"]
    cost = costs(final, student.cpu(), data)
    described = run_folder.describe(final, data.info, last.prepared.allocation, cost)
    described["epochs"] = _epochs(final, last, data)
    wall_s = time.perf_counter() - start + ended.earlier_s
    _record(cfg, folder, {**described, **metrics}, last, loggers, wall_s=wall_s)
    return metrics


@dataclass(frozen=True)
class Ended:
    """A run whose stages have ended: the last of them, and what went before.

    ``calibrated`` is the student as calibration left it, where no earlier stage had changed its weights; ``earlier_s``
    are seconds of training before this process began.
    """

    last: Trained
    calibrated: nn.Module | None
    earlier_s: float


def _check(cfg: DictConfig) -> None:
    """Make what is cheap to make and may be refused, so that nobody waits for a teacher to be trained first."""
    instantiate(cfg.objective)
    instantiate(cfg.lr_schedule)
    named_callbacks(cfg, MetricLog(loggers=[]))


def _fit_stages(
    cfg: DictConfig,
    stages: list[Stage],
    full_precision: nn.Module,
    data: VisionData,
    folder: Path,
    loggers: tuple[Logger, ...],
) -> Ended:
    """Run the stages that have not ended yet, one after the other."""
    before: StageState | None = None
    calibrated: nn.Module | None = None
    earlier_s = 0.0
    for number, stage in enumerate(stages, start=1):
        final = number == len(stages)
        if not final and (kept := stage.load()) is not None:
            log.info("stage %d of %d, %s: has ended before", number, len(stages), stage.name)
            before, earlier_s = kept, kept.train_s
            continue
        if stage.name:
            log.info("stage %d of %d: %s", number, len(stages), stage.name)
        images = data if stage.cfg.data == cfg.data else load_data(stage.cfg)
        student_state = None if before is None else before.student
        prepared = prepare.quantize(stage.cfg, copy.deepcopy(full_precision), images, student_state)
        if final:
            cost = costs(stage.cfg, prepared.student, images)
            _log_size(cost, folder.name)
            tell_student(loggers, run_folder.describe(stage.cfg, images.info, prepared.allocation, cost))
            calibrated = copy.deepcopy(prepared.student) if before is None else None
        trained = run_stage(stage, prepared, before, images, folder, loggers)
        before, earlier_s = trained.state, earlier_s + trained.fitted.earlier_s
        if not final:
            _keep(stage, trained.state)
    return Ended(trained, calibrated, earlier_s)


@rank_zero_only
def _keep(stage: Stage, state: StageState, *, finished: bool = True) -> None:
    stage.save(state, finished=finished)


def _epochs(cfg: DictConfig, trained: Trained, data: VisionData) -> float:
    """How often all images were seen; stages may end within an epoch."""
    epochs = trained.state.end.step * cfg.trainer.accumulate_grad_batches / len(data.train_dataloader())
    return round(epochs) if abs(epochs - round(epochs)) < 0.01 else round(epochs, 2)


def _log_size(cost: CostReport, name: str) -> None:
    log.info(
        "%s: %.1f kB, in full precision %.1f kB; %.2f bits per weight",
        name, cost.size_bytes / 1e3, cost.fp_size_bytes / 1e3, cost.effective_bits,
    )  # fmt: skip


def _reestimate_batchnorm(cfg: DictConfig, student: nn.Module, data: VisionData, device: torch.device) -> None:
    """From images augmented as in training, of the epoch that would come next.

    Images without augmentation have other statistics (no black edges): on CIFAR-10 that costs over two points.
    """
    loader = data.train_dataloader()
    loader.set_epoch(cfg.fit.epochs)
    images = (batch.image.to(device) for batch in islice(loader, cfg.fit.reestimate_bn))
    reestimate_batchnorm(student, images)


@rank_zero_only
def _record(
    cfg: DictConfig,
    folder: Path,
    summary: dict[str, Any],
    trained: Trained,
    loggers: tuple[Logger, ...],
    *,
    wall_s: float,
) -> None:
    fitted, state = trained.fitted, trained.state
    run_folder.save_weights(trained.prepared.student, folder / run_folder.STUDENT)
    summary |= {
        "name": folder.name,
        "distill": "+".join(state.distill) or "none",
        "step_ms": 1e3 * state.train_s / max(1, state.end.step),
        "wall_s": wall_s,
        "status": FINISHED if cfg.fit.final_test else "not tested",
    }
    notes = f"budget={cfg.budget}, lr={cfg.optimizer.get('lr')}" + (", resumed" if fitted.resumed else "")
    if cfg.stages:
        notes += ", stages " + " ".join(cfg.stages)
    run_folder.append_results(cfg, folder, summary, device=fitted.device, notes=notes)
    run_folder.finish(folder, summary)
    tell_outcome(loggers, folder, summary)


@rank_zero_only
def _show(folder: Path) -> None:
    print_summary(folder.parent)
