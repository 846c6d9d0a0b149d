"""One fit by Lightning, resumed where a former one in the same folder stopped."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from pytorch_lightning.loggers import Logger

from qtrain.config.instantiate import instantiate
from qtrain.data.base import VisionData
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
from qtrain.utils.errors import ConfigError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fitted:
    """What a fit leaves behind, beside a trained module.

    ``device`` is what it ran on. ``train_s`` are the seconds of training, ``earlier_s`` those of them that were spent
    before a resumption. ``end`` is where the run stands now, ``optimizer`` the optimizer's state dict, ``metrics`` what
    callbacks found, by their name in the config.
    """

    device: torch.device
    train_s: float
    earlier_s: float
    resumed: bool
    end: Position
    optimizer: dict[str, Any]
    metrics: dict[str, dict[str, float]]


def fit(
    cfg: DictConfig,
    *,
    module: QATModule,
    data: VisionData,
    folder: Path,
    identity: str,
    epochs: int,
    title: str,
    steps: int | None = None,
    loggers: tuple[Logger, ...] = (),
    command: str = "",
    start: Position = Position(),  # noqa: B008 - immutable
    checkpoints: Path | None = None,
    watchers: Sequence[pl.Callback] = (),
) -> Fitted:
    """Fit ``module`` for ``epochs``, or for ``steps`` optimizer steps where given, in ``folder``.

    The folder gets ``metrics.jsonl``, and resume points below it, or in ``checkpoints``. ``start`` is where the run's
    earlier stages stopped; ``watchers`` are callbacks that only look on.

    With ``cfg.resume`` a resume point of the same ``identity`` in the folder is continued. ``command`` is what an
    interrupted run tells its user to type. Raises ``RunInterruptedError`` after a signal, once all is saved.
    """
    points = checkpoints or folder / "checkpoints"
    data.start_at(start.epoch)
    resume_points = ResumePoints(folder=points, every_n_steps=cfg.fit.checkpoint_every_steps, identity=identity)
    file = JsonlLogger(folder=folder)
    metric_log = MetricLog(loggers=[file, *loggers], every_n_steps=cfg.fit.log_every_steps, start=start)
    named = named_callbacks(cfg, metric_log)
    callbacks: list[pl.Callback] = [
        StopOnNonFinite(),
        *([WeightAverage(decay=cfg.fit.weight_average)] if cfg.fit.weight_average is not None else []),
        *named.values(),
        *([Health(metric_log=metric_log, every_n_steps=n)] if (n := cfg.fit.health_every_steps) else []),
        metric_log,
        *watchers,
        Progress(title=title),
        resume_points,
        StopOnSignal(resume_points=resume_points, command=command),
    ]
    trainer: pl.Trainer = instantiate(
        cfg.trainer,
        max_epochs=epochs if steps is None else -1,
        max_steps=-1 if steps is None else steps,
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        logger=False,
        limit_val_batches=1.0 if data.info.val_size else 0,
        precision=_precision(cfg.fit.precision),
        strategy=_strategy(cfg),
        default_root_dir=str(folder),
    )()
    point = find_resume_point(points) if cfg.resume else None
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
    return Fitted(
        device=trainer.strategy.root_device,
        train_s=metric_log.elapsed_s,
        earlier_s=metric_log.earlier_s,
        resumed=point is not None,
        end=Position(
            epoch=start.epoch + trainer.current_epoch,
            step=start.step + trainer.global_step,
            written=file.position() if trainer.is_global_zero else 0,
        ),
        optimizer=trainer.strategy.optimizer_state(trainer.optimizers[0]),
        metrics={name: c.metrics() for name, c in named.items() if isinstance(c, FindsLayerMetrics)},
    )


def named_callbacks(cfg: DictConfig, metric_log: MetricLog) -> dict[str, pl.Callback]:
    """Those that the config names; a ``None`` takes away what an experiment has."""
    made = {}
    for name, node in (cfg.callbacks or {}).items():
        if node is not None:
            try:
                made[str(name)] = instantiate(node)(metric_log=metric_log)
            except ValueError as error:
                raise ConfigError(f"callbacks.{name}: {error}") from error
    return made


def shares_batches(cfg: DictConfig) -> bool:
    """Whether batch norm is to look at the images of several processes."""
    own = cfg.trainer
    return bool(cfg.fit.get("sync_batchnorm", True)) and several(devices=own.devices, nodes=own.num_nodes)


def shards_student(cfg: DictConfig) -> bool:
    """Whether the student's weights are to be spread over several processes."""
    return bool(cfg.fit.get("shard", False)) and several(devices=cfg.trainer.devices, nodes=cfg.trainer.num_nodes)


def _strategy(cfg: DictConfig) -> Any:
    trainer = cfg.trainer
    return strategy_for(
        trainer.strategy,
        devices=trainer.devices,
        nodes=trainer.num_nodes,
        accumulated=trainer.accumulate_grad_batches,
        shard=shards_student(cfg),
    )


def _precision(asked: str | None) -> str:
    if asked is not None:
        return asked
    return "bf16-mixed" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "32-true"
