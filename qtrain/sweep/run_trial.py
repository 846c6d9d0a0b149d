"""One trial of a sweep: a training run that reports each epoch, and what became of it. Knows nothing of Ray.

A trial that fails for its own reason (a loss that is not finite, memory, a config that cannot run) is a result like any
other, with its reason; a process that is killed is none, and the trial goes on from its resume points in the next one.
"""

import copy
import gc
import io
import json
import logging
import math
import platform
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict, final

import pytorch_lightning as pl
import torch

from qtrain.convert.layers import quant_layers
from qtrain.data.base import VisionData
from qtrain.models.ends import ends_of
from qtrain.nn import Operand
from qtrain.pipeline.build_model import example_input
from qtrain.pipeline.costs import costs, further_costs
from qtrain.pipeline.run_cache import RunCache, run_cache_in
from qtrain.pipeline.summary import read_summary
from qtrain.pipeline.train import train
from qtrain.pipeline.trial_callbacks import with_trial_callbacks
from qtrain.settings.run_files import METRICS, SUMMARY
from qtrain.settings.run_settings import RunSettings
from qtrain.spec import FULL_PRECISION, Position
from qtrain.sweep.domains import KnobValue
from qtrain.sweep.inherit_stages import inherit_stages
from qtrain.sweep.reward import with_reward
from qtrain.sweep.trial import COST_METRICS, Trial
from qtrain.training.student import student_of
from qtrain.utils.atomic_write import write_text
from qtrain.utils.json_lines import read_metrics
from qtrain.utils.memory import peak_bytes

log = logging.getLogger(__name__)

TRIAL, LOG = "trial.json", "trial.log"
"""What became of a trial, and what it said, in its run's folder."""

Reporter = Callable[[dict[str, float]], None]
"""Takes an epoch's metrics; it may raise ``SystemExit`` to end the trial."""


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A trial to be run: its ``id`` in the sweep, the ``key`` that its config has, and what makes the config.

    ``overrides`` are all that the config is composed of, ``knobs`` what the search chose. ``parent`` is the key of the
    trial whose stages this one goes on from.
    """

    id: str
    key: str
    overrides: list[str] = field(default_factory=list)
    knobs: dict[str, KnobValue] = field(default_factory=dict)
    parent: str | None = None


class Described(TypedDict):
    """The fields of :class:`Trial` that are known before it runs."""

    id: str
    key: str
    overrides: list[str]
    knobs: dict[str, KnobValue]


class ProposalFields(Described):
    """A :class:`Proposal` as plain values."""

    parent: str | None


def described(proposal: Proposal) -> Described:
    """What ``proposal`` says of its trial."""
    return {"id": proposal.id, "key": proposal.key, "overrides": proposal.overrides, "knobs": proposal.knobs}


@dataclass
class TrialRecord:
    """What was seen of a run while it trained: see :class:`Trial`. ``val_s`` are seconds of ``fit_s``.

    ``best_top1`` is the best accuracy on the validation images so far, in percent.
    """

    layer_bits: dict[str, list[int]] = field(default_factory=dict)
    ends: list[str] = field(default_factory=list)
    images: dict[str, int] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)
    epochs: float = 0.0
    fit_s: float = 0.0
    val_s: float = 0.0
    best_top1: float = -math.inf


@final
class EpochReport(pl.Callback):
    """Reports the metrics of each epoch but the last of ``epochs``, which the run's own end tells of.

    They are ``epochs`` done, ``top1`` and ``loss`` on the validation images, whatever else is logged under ``val/``,
    and the costs. Before the epoch's resume point is written: an epoch that is done again reports the same again.
    """

    def __init__(
        self, *, settings: RunSettings, report: Reporter, record: TrialRecord, epochs: float, start: Position
    ) -> None:
        super().__init__()
        self._settings, self._report, self._record = settings, report, record
        self._epochs, self._start = epochs, start
        self._began = self._val_began = 0.0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._began = time.perf_counter()
        student = student_of(pl_module)
        if pl_module.device.type != "cpu":
            student = copy.deepcopy(student).cpu()
        data: VisionData = trainer.datamodule  # type: ignore[attr-defined]
        cost = costs(self._settings, student, data)
        counted = {name: float(getattr(cost, name)) for name in COST_METRICS}
        self._record.costs = {**counted, **further_costs(self._settings, student, data, cost)}
        weighted = [name for name, layer in quant_layers(student).items() if not isinstance(layer, Operand)]
        first, last = ends_of(student, weighted, example_input(data.info))
        self._record.ends = [name for name in weighted if name in first | last]
        self._record.images = {"val": data.info.val_size, "test": data.info.test_size}

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._record.fit_s += time.perf_counter() - self._began
        self._record.epochs = self._start.epoch + trainer.current_epoch
        self._record.layer_bits = layer_bits_of(student_of(pl_module))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._val_began = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._record.val_s += time.perf_counter() - self._val_began

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        done = self._start.epoch + trainer.current_epoch + 1
        self._record.epochs = done
        if done < self._epochs:
            logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
            found = validation_metrics([logged])
            if "top1" in found:
                self._record.best_top1 = found["best_top1"] = max(self._record.best_top1, found["top1"])
            metrics = {**found, **self._record.costs}
            self._report({"epochs": float(done), **with_reward(metrics, self._settings.sweep.reward)})


def layer_bits_of(student: torch.nn.Module) -> dict[str, list[int]]:
    """[weight, input] bits of each layer of a converted model, as its quantizers have them now."""
    layer_bits = {}
    for name, layer in quant_layers(student).items():
        weight = None if isinstance(layer, Operand) else layer.weight_quantizer
        pair = (weight, layer.input_quantizer)
        layer_bits[name] = [FULL_PRECISION if part is None else int(part.bits) for part in pair]
    return layer_bits


def validation_metrics(rows: list[Mapping[str, float]]) -> dict[str, float]:
    """``top1``, ``best_top1``, ``loss`` and all names under ``val/`` of the last of ``rows``, epoch by epoch.

    >>> validation_metrics([{"val/top1": 90.0, "val/loss": 0.5}, {"val/top1": 80.0, "val/loss": 0.7}])["best_top1"]
    90.0
    """
    named = [{name: value for name, value in row.items() if name.startswith("val/")} for row in rows]
    last = next((row for row in reversed(named) if "val/top1" in row), None)
    if last is None:
        return {}
    best = max(row["val/top1"] for row in named if "val/top1" in row)
    return {"top1": last["val/top1"], "best_top1": best, "loss": last["val/loss"], **last}


def run_trial(
    settings: RunSettings, proposal: Proposal, *, report: Reporter, store: RunCache, threads: int, leads: bool = True
) -> Trial:
    """Train ``proposal``, whose config is ``settings``, and leave ``trial.json`` beside what the run itself leaves.

    A run that has ended in this folder is told again, not repeated. What ``report`` raises to end the trial goes
    through. Of several processes one ``leads``, and leaves what is to be read.
    """
    folder = Path(settings.run_dir)
    if (ended := read_trial(folder)) is not None:
        return replace(ended, **described(proposal))
    torch.set_num_threads(threads)
    started, clock, record = time.time(), time.perf_counter(), TrialRecord()
    about: dict[str, Any] = {**described(proposal), "started": started, "host": platform.node(), "threads": threads}
    epochs = settings.epochs

    def epoch_report(start: Position) -> EpochReport:
        return EpochReport(settings=settings, report=report, record=record, epochs=epochs, start=start)

    try:
        with (
            run_cache_in(store),
            with_trial_callbacks(epoch_report),
            _said_in(folder / LOG),
            redirect_stdout(io.StringIO()),
        ):
            record.best_top1 = _best_before(folder)
            if proposal.parent is not None:
                inherit_stages(folder.parent / proposal.parent, folder)
            # A later trial may go on from the last of several stages.
            train(settings, keep_last=bool(settings.stages))
        about |= {
            "status": "finished",
            "metrics": with_reward({**record.costs, **final_metrics(folder)}, settings.sweep.reward) if leads else {},
        }
        if leads:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # nothing resumes from what has ended
    except Exception as error:
        log.warning("trial %s failed: %s", proposal.id, reason_of(error))
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / LOG).open("a", encoding="utf-8") as file:
            traceback.print_exc(file=file)
        about |= {"status": "failed", "reason": reason_of(error), "metrics": dict(record.costs)}
        # The traceback holds the trial's tensors; the next trial needs their room.
        error.__traceback__ = None
    _free()
    trial = Trial(
        **about,
        layer_bits=record.layer_bits,
        ends=record.ends,
        images=record.images,
        epochs=record.epochs,
        train_s=record.fit_s,
        overhead_s=time.perf_counter() - clock - record.fit_s,
        peak_bytes=peak_bytes(),
        ended=time.time(),
    )
    if leads:
        write_text(folder / TRIAL, json.dumps(asdict(trial)))
    return trial


def final_metrics(folder: Path) -> dict[str, float]:
    """All metrics of the run that has ended in ``folder``: validation's at its last epoch, and exact costs.

    Raises ``ValueError`` where no epoch was validated.
    """
    rows = [
        {f"val/{name}": value for name, value in row.items() if isinstance(value, int | float)}
        for row in read_metrics(folder / METRICS)[0]
        if row["split"] == "val"
    ]
    metrics = validation_metrics(rows)  # type: ignore[arg-type]
    if not metrics:
        raise ValueError("sweep: the run ended without a validation; let it train at least one whole epoch")
    own = {name: value for name, value in metrics.items() if name.removeprefix("val/") not in ("step", "epoch", "time")}
    summary = read_summary(folder / SUMMARY)
    known = {name: getattr(summary, name) for name in (*COST_METRICS, "step_ms")}
    return {**own, **{name: float(value) for name, value in known.items() if value is not None}}


def _best_before(folder: Path) -> float:
    """The best accuracy of the run in ``folder`` before it was interrupted, in percent; -inf where it had none."""
    rows = read_metrics(folder / METRICS)[0] if (folder / METRICS).is_file() else []
    return max((float(row["top1"]) for row in rows if row["split"] == "val" and "top1" in row), default=-math.inf)


def read_trial(folder: Path) -> Trial | None:
    """What became of the trial in ``folder``, where that is known."""
    try:
        return Trial(**json.loads((folder / TRIAL).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def reason_of(error: BaseException) -> str:
    """``error`` as one line; what is no message for a user keeps its kind."""
    text = " ".join(str(error).split())
    if isinstance(error, ValueError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _free() -> None:
    """Give back what the trial held on a GPU. Lightning's cycles hold it until the collector comes."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


@contextmanager
def _said_in(path: Path) -> Iterator[None]:
    """Let what qtrain logs in this block go to ``path`` as well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    logger, handler = logging.getLogger("qtrain"), logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
        handler.close()
