"""A low-bit student, from its data to its summary: load, convert, calibrate, distill, evaluate, record."""

import copy
import logging
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only
from torch import nn

from qtrain.costs.count import CostReport
from qtrain.data.base import VisionData
from qtrain.data.image_grid import keep_picture
from qtrain.nn.many_bits import by_width
from qtrain.pipeline import prepare, run_folder
from qtrain.pipeline.build_model import build_model
from qtrain.pipeline.costs import costs
from qtrain.pipeline.examples import keep_examples
from qtrain.pipeline.fit import accumulated_batches, named_callbacks
from qtrain.pipeline.load_data import depends_on, load_data
from qtrain.pipeline.many_bits import figures_by_width, settings_by_width
from qtrain.pipeline.prepare import Prepared
from qtrain.pipeline.pretrain import full_precision_weights, members_of, must_train
from qtrain.pipeline.run_cache import cached
from qtrain.pipeline.run_folder import Metrics, run_in_folder
from qtrain.pipeline.run_stage import run_stage
from qtrain.pipeline.stages import Stage, StageResult, StageState, stages_of
from qtrain.pipeline.student_file import write_student
from qtrain.pipeline.summary import CALIBRATED, DISTILLED, FINISHED, FLOAT, TRAINED
from qtrain.pipeline.tested import Tested, on_test_images
from qtrain.settings.component import Component
from qtrain.settings.run_files import STUDENT
from qtrain.settings.run_settings import RunSettings
from qtrain.spec import DataInfo
from qtrain.tracking.metric_log import MetricLog
from qtrain.tracking.run_tracking import open_loggers, tell_outcome, tell_source, tell_student
from qtrain.training.callbacks.batchnorm import reestimate_batchnorm
from qtrain.utils.errors import ConfigError

log = logging.getLogger(__name__)


def train(settings: RunSettings, *, keep_last: bool = False) -> Metrics:
    """Train one student; returns ``top1``, ``fp_top1`` and ``ptq_top1`` in percent (``None`` without a final test).

    A finished run of the same config is not repeated. With ``keep_last`` the state of the last stage is kept as those
    before it are, so that a run of more stages may go on from it.
    """

    def work(folder: Path) -> Metrics:
        with open_loggers(settings, folder) as loggers:
            return _train(settings, folder, loggers, keep_last=keep_last)

    return run_in_folder(settings, work, names=("top1", "fp_top1", "ptq_top1"))


def _train(settings: RunSettings, folder: Path, loggers: tuple[Logger, ...], *, keep_last: bool) -> Metrics:
    start = time.perf_counter()
    torch.manual_seed(settings.seed)
    settings_by_width(settings)  # what does not go with many bits is said first

    data = load_data(settings)
    if data.info.num_classes < 2:
        raise ConfigError(f"data: {data.info.name} has one class; training needs two or more, a folder for each")
    keep_picture(data, folder)
    stages = stages_of(settings, folder)
    # With the weights at hand the conversion itself is next, and in later stages it comes soon.
    needed = [settings.model, *(model for stage in stages for model in _teachers(stage.settings))]
    rehearsed = settings.quantize.enabled and any(must_train(model, settings, data) for model in needed)
    for stage in stages:
        _check(stage.settings)
        if rehearsed:
            with torch.random.fork_rng(devices=[]):
                prepare.rehearse(stage.settings, data)
    # A full-precision run starts from what its config names, a quantized one from trained weights in any case.
    weights = full_precision_weights(settings.model, settings, data) if settings.quantize.enabled else None
    full_precision = cached(
        "model",
        {**depends_on(settings), "weights": weights},
        lambda: build_model(settings.model, data.info, weights=weights),
    )
    tell_source(loggers, weights)
    last = _run_stages(settings, stages, full_precision, data, folder, loggers)
    if keep_last:
        _keep(stages[-1], last.state, finished=False)

    student, final = last.student, stages[-1].settings
    if final.fit.reestimate_bn:
        _reestimate_batchnorm(final, student.to(last.device), data, last.device)
    if final.target is not None:
        prepare.settle_for_target_(student)
    tested = Tested({"top1": None, "fp_top1": None, "ptq_top1": None}, {})
    if settings.fit.final_test:
        models = {"fp_top1": full_precision, "top1": student}
        if last.allocation:
            calibrated = last.calibrated
            if calibrated is None:
                calibrated = prepare.prepare_student(final, copy.deepcopy(full_precision), data).student
            models["ptq_top1"] = calibrated
        found = on_test_images(models, data, last.device)
        tested = replace(found, metrics=tested.metrics | found.metrics)
        _keep_examples(folder, data, models, last)
    cost = costs(final, student.cpu(), data)
    described = run_folder.describe(final, data.info, last.allocation, cost)
    described |= {"epochs": _epochs(final, last, data), "recipe_hash": settings.recipe}
    described |= tested.fields
    described |= {"widths": figures_by_width(final, student, data, tested)}
    wall_s = time.perf_counter() - start + last.earlier_s
    _record(settings, folder, described, last, data.info, loggers, wall_s=wall_s)
    return tested.metrics


def _teachers(settings: RunSettings) -> list[Component]:
    """The teacher, or the members of an ensemble."""
    chosen = settings.teacher.model
    if chosen is None or chosen.target is None:
        return []
    return list(members_of(chosen).values()) or [chosen]


def _check(settings: RunSettings) -> None:
    """Make what is cheap to make and may be refused, so that nobody waits for a teacher to be trained first."""
    settings.objective.build()
    settings.lr_schedule.build()
    named_callbacks(settings, MetricLog(loggers=[]))


def _run_stages(
    settings: RunSettings,
    stages: list[Stage],
    full_precision: nn.Module,
    data: VisionData,
    folder: Path,
    loggers: tuple[Logger, ...],
) -> StageResult:
    """Run the stages that have not ended yet, one after the other; returns the result of the last one."""
    before: StageState | None = None
    earlier_s = 0.0
    *others, last = stages
    for number, stage in enumerate(others, start=1):
        if (ended := stage.load()) is not None:
            log.info("stage %d of %d, %s: has ended before", number, len(stages), stage.name)
            before, earlier_s = ended, ended.train_s
            continue
        log.info("stage %d of %d: %s", number, len(stages), stage.name)
        images = data if stage.settings.data == settings.data else load_data(stage.settings)
        result = run_stage(stage, _prepared(stage, full_precision, images, before), before, images, folder, loggers)
        before, earlier_s = result.state, earlier_s + result.earlier_s
        _keep(stage, result.state)
    if last.name:
        log.info("stage %d of %d: %s", len(stages), len(stages), last.name)
    images = data if last.settings.data == settings.data else load_data(last.settings)
    prepared = _prepared(last, full_precision, images, before)
    cost = costs(last.settings, prepared.student, images)
    _log_size(cost, folder.name)
    tell_student(loggers, run_folder.describe(last.settings, images.info, prepared.allocation, cost))
    calibrated = copy.deepcopy(prepared.student) if before is None else None
    result = run_stage(last, prepared, before, images, folder, loggers)
    return replace(result, calibrated=calibrated, earlier_s=earlier_s + result.earlier_s)


def _prepared(stage: Stage, full_precision: nn.Module, images: VisionData, before: StageState | None) -> Prepared:
    inherited = None if before is None else before.student
    return prepare.prepare_student(stage.settings, copy.deepcopy(full_precision), images, inherited)


@rank_zero_only
def _keep(stage: Stage, state: StageState, *, finished: bool = True) -> None:
    stage.save(state, finished=finished)


@rank_zero_only
def _keep_examples(folder: Path, data: VisionData, models: dict[str, nn.Module], last: StageResult) -> None:
    trained = (DISTILLED if last.state.distill else TRAINED) if last.allocation else FLOAT
    ways = {"fp_top1": FLOAT, "ptq_top1": CALIBRATED, "top1": trained}
    keep_examples(folder, data, {ways[name]: model for name, model in models.items()}, last.device)


def _epochs(settings: RunSettings, last: StageResult, data: VisionData) -> float:
    """How often all images were seen; stages may end within an epoch."""
    batches = last.state.end.step * accumulated_batches(settings)
    epochs = batches / len(data.train_dataloader())
    return round(epochs) if abs(epochs - round(epochs)) < 0.01 else round(epochs, 2)


def _log_size(cost: CostReport, name: str) -> None:
    log.info(
        "%s: %.1f kB, in full precision %.1f kB; %.2f bits per weight",
        name, cost.size_bytes / 1e3, cost.fp_size_bytes / 1e3, cost.effective_bits,
    )  # fmt: skip


def _reestimate_batchnorm(settings: RunSettings, student: nn.Module, data: VisionData, device: torch.device) -> None:
    """From images augmented as in training, of the epoch that would come next.

    Images without augmentation have other statistics (no black edges): on CIFAR-10 that costs over two points.
    """
    for one in by_width(student).values():
        loader = data.train_dataloader()
        loader.set_epoch(settings.fit.epochs)
        images = (batch.image.to(device) for batch in islice(loader, settings.fit.reestimate_bn))
        reestimate_batchnorm(one, images)


@rank_zero_only
def _record(
    settings: RunSettings,
    folder: Path,
    summary: dict[str, object],
    last: StageResult,
    info: DataInfo,
    loggers: tuple[Logger, ...],
    *,
    wall_s: float,
) -> None:
    state = last.state
    summary |= write_student(settings, folder, last.student, info, summary)
    summary |= {
        "name": folder.name,
        "distill": "+".join(state.distill) or "none",
        "step_ms": 1e3 * state.train_s / max(1, state.end.step),
        "wall_s": wall_s,
        "status": FINISHED if settings.fit.final_test else "not tested",
    }
    notes = f"budget={settings.budget}, lr={settings.optimizer.get('lr')}" + (", resumed" if last.resumed else "")
    if settings.stages:
        notes += ", stages " + " ".join(settings.stages)
    run_folder.append_results(settings, folder, summary, device=last.device, notes=notes)
    run_folder.finish(folder, summary)
    tell_outcome(loggers, folder / STUDENT, summary)
