"""One fit by Lightning, resumed where a former one in the same folder stopped."""

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import Logger
from pytorch_lightning.strategies import Strategy
from torch import nn

from qtrain.convert.inherit import student_state_of
from qtrain.convert.layers import quantizers_of
from qtrain.data.fit_data import FitData
from qtrain.pipeline.stages import StageResult, StageState, tensors_of
from qtrain.quantizers.hooks import Penalizing
from qtrain.settings.run_settings import RunSettings
from qtrain.spec import Position
from qtrain.tracking.loggers import JsonlLogger
from qtrain.tracking.metric_log import MetricLog
from qtrain.training.callbacks.average import WeightAverage
from qtrain.training.callbacks.finite import StopOnNonFinite
from qtrain.training.callbacks.health import Health
from qtrain.training.callbacks.layer_metrics import FindsLayerMetrics
from qtrain.training.callbacks.progress import Progress
from qtrain.training.callbacks.signals import StopOnSignal
from qtrain.training.checkpoint import AtomicCheckpointIO, find_resume_point
from qtrain.training.module import QATModule
from qtrain.training.ranks import agree_, several, strategy_for
from qtrain.training.resume import ResumePoints
from qtrain.utils.errors import ConfigError, as_config_error

log = logging.getLogger(__name__)


def fit(
    settings: RunSettings,
    *,
    module: QATModule,
    data: FitData,
    folder: Path,
    identity: str,
    epochs: int,
    title: str,
    steps: int | None = None,
    loggers: tuple[Logger, ...] = (),
    command: str = "",
    start: Position = Position(),  # noqa: B008 - immutable
    checkpoints: Path | None = None,
    trial_callbacks: Sequence[pl.Callback] = (),
) -> StageResult:
    """Fit ``module`` for ``epochs``, or for ``steps`` optimizer steps where given, in ``folder``.

    The folder gets ``metrics.jsonl``, and resume points below it, or in ``checkpoints``. ``start`` is where the run's
    earlier stages stopped; ``trial_callbacks`` only look on: a sweep has them.

    With ``settings.resume`` a resume point of the same ``identity`` in the folder is continued. ``command`` is what an
    interrupted run tells its user to type. Raises ``RunInterruptedError`` after a signal, once all is saved.
    """
    points = checkpoints or folder / "checkpoints"
    data.start_at(start.epoch)
    resume_points = ResumePoints(folder=points, every_n_steps=settings.fit.checkpoint_every_steps, identity=identity)
    file = JsonlLogger(folder=folder)
    metric_log = MetricLog(loggers=[file, *loggers], every_n_steps=settings.fit.log_every_steps, start=start)
    named = named_callbacks(settings, metric_log)
    callbacks: list[pl.Callback] = [
        StopOnNonFinite(),
        *([WeightAverage(decay=settings.fit.weight_average)] if settings.fit.weight_average is not None else []),
        *named.values(),
        *([Health(metric_log=metric_log, every_n_steps=n)] if (n := settings.fit.health_every_steps) else []),
        metric_log,
        *trial_callbacks,
        Progress(title=title),
        resume_points,
        StopOnSignal(resume_points=resume_points, command=command),
    ]
    trainer: pl.Trainer = settings.trainer.build(
        max_epochs=epochs if steps is None else -1,
        max_steps=-1 if steps is None else steps,
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO(identity=identity)],
        logger=False,
        limit_val_batches=1.0 if data.info.val_size else 0,
        precision=_precision(settings.fit.precision, module.student),
        strategy=_strategy(settings),
        default_root_dir=str(folder),
    )()
    point = find_resume_point(points) if settings.resume else None
    if point is not None:
        log.info("%s: resuming from %s", title, point)
    with warnings.catch_warnings():
        # Lightning's own affair, and nothing that a user could mend.
        warnings.filterwarnings("ignore", message=r".*LeafSpec", category=FutureWarning)
        # Frozen layers' weight quantizers are so on purpose.
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")
        trainer.fit(module, datamodule=data, ckpt_path=str(point) if point else None)
    agree_(module)
    module.float()  # after a fit in 64 bits, or in 16: what is evaluated and kept has 32
    for quantizer in quantizers_of(module).values():  # 16 bits do not hold the ends of more than 8
        quantizer.set_range_(bits=int(quantizer.bits), signed=bool(quantizer.signed))
    objective, teacher = module.objective, module.learning_teacher
    state = StageState(
        student=student_state_of(module.student),
        end=Position(
            epoch=start.epoch + trainer.current_epoch,
            step=start.step + trainer.global_step,
            written=file.position() if trainer.is_global_zero else 0,
        ),
        objective=tensors_of(objective),
        optimizer=trainer.strategy.optimizer_state(trainer.optimizers[0]),
        teacher=None if teacher is None else tensors_of(teacher.model),
        metrics={name: c.metrics() for name, c in named.items() if isinstance(c, FindsLayerMetrics)},
        train_s=metric_log.elapsed_s,
        distill=(*objective.teacher_terms, *(["in_place"] if module.narrow_objective is not None else [])),
    )
    return StageResult(
        module.student, state, trainer.strategy.root_device, earlier_s=metric_log.earlier_s, resumed=point is not None
    )


def named_callbacks(settings: RunSettings, metric_log: MetricLog) -> dict[str, pl.Callback]:
    """Those that the config names; a ``None`` takes away what an experiment has."""
    made = {}
    for name, chosen in settings.callbacks.items():
        if chosen is not None:
            with as_config_error(f"callbacks.{name}"):
                made[name] = chosen.build()(metric_log=metric_log)
    return made


def shares_batches(settings: RunSettings) -> bool:
    """Whether batch norm is to look at the images of several processes."""
    return settings.fit.sync_batchnorm and several_processes(settings)


def shards_student(settings: RunSettings) -> bool:
    """Whether the student's weights are to be spread over several processes."""
    return settings.fit.shard and several_processes(settings)


def several_processes(settings: RunSettings) -> bool:
    """Whether the run is one of several processes."""
    trainer = settings.trainer
    return several(devices=trainer.get("devices"), nodes=trainer.get("num_nodes"))


def accumulated_batches(settings: RunSettings) -> int:
    """How many batches make one optimizer step."""
    return int(settings.trainer.get("accumulate_grad_batches", 1))


def _strategy(settings: RunSettings) -> Strategy | str:
    trainer = settings.trainer
    strategy: Strategy | str = strategy_for(
        trainer.get("strategy"),
        devices=trainer.get("devices"),
        nodes=trainer.get("num_nodes"),
        accumulated=accumulated_batches(settings),
        shard=shards_student(settings),
    )
    return strategy


def _precision(asked: str | None, student: nn.Module) -> str:
    """``asked``, or what the machine is best at. Raises ``ConfigError`` where a loss would be scaled, penalties not."""
    if asked == "16-mixed" and (adding := next((m for m in student.modules() if isinstance(m, Penalizing)), None)):
        raise ConfigError(
            f"fit.precision: 16-mixed scales the loss, and not what {type(adding).__name__} adds to its gradient; take "
            "bf16-mixed or 32-true"
        )
    if asked is not None:
        return asked
    return "bf16-mixed" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "32-true"
