"""Writes the rows of metrics, in an order that makes them exact when a run is killed and resumed.

Lightning gives metrics to its loggers after the callbacks of a batch, and so after the checkpoint of that batch. If a
run were killed between the two, the resumed run would continue after a row that was never written. The metric log
therefore writes rows itself, in a callback before ``ResumePoints`` saves, and stores the length of metrics.jsonl in the
checkpoint. It writes what ``self.log`` logs under ``train/``, ``val/`` and ``test/``; the trainer gets
``logger=False``.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any, final

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import Logger
from torch import Tensor

from qtrain.functional.ranks import mean_of_ranks, world_size
from qtrain.spec import Position
from qtrain.tracking.loggers import JsonlLogger, close
from qtrain.tracking.wandb_run import WandbRun
from qtrain.utils.json_lines import read_metrics


@final
class MetricLog(pl.Callback):
    """Writes what ``self.log`` collected to ``loggers``: train rows every ``every_n_steps``, val and test rows at once.

    A train row has the values of its step, the learning rate that the step was made with (``lr``, and ``lr/<name>`` of
    a parameter group with its own rate) and ``images_per_s`` since the last row. The step of a row is the number of
    finished optimizer steps. A logger that is ``None`` (W&B, if it is off) is left out. Values are read only for a row,
    since reading waits for the device. ``start`` is the run's progress when this fit begins: steps and epochs are
    counted from there, and rows of earlier stages are kept.
    """

    def __init__(
        self,
        *,
        loggers: Sequence[Logger | None],
        every_n_steps: int = 10,
        start: Position = Position(),  # noqa: B008 - immutable
    ) -> None:
        super().__init__()
        if every_n_steps < 1:
            raise ValueError(f"MetricLog: every_n_steps must be at least 1, got {every_n_steps}")
        self.loggers = [logger for logger in loggers if logger is not None]
        self.every_n_steps = every_n_steps
        self.start = start
        self._restored = False
        self._row_step = -1
        self._images = 0
        self._rates: dict[str, float | Tensor] = {}
        self._since = time.perf_counter()
        self._started: float | None = None
        self._earlier_s = 0.0

    @property
    def earlier_s(self) -> float:
        """Seconds of training before this process resumed the run."""
        return self._earlier_s

    @property
    def elapsed_s(self) -> float:
        """Seconds spent in training, including those before a resumption."""
        return self._earlier_s + (0.0 if self._started is None else time.perf_counter() - self._started)

    def write(self, trainer: pl.Trainer, metrics: Mapping[str, float]) -> None:
        """Write one row for each split in ``metrics`` (named as in ``val/top1``) at the trainer's step and epoch."""
        if trainer.is_global_zero and metrics:
            epoch, step = self.start.epoch + trainer.current_epoch, self.start.step + trainer.global_step
            for logger in self.loggers:
                logger.log_metrics({**metrics, "epoch": epoch}, step=step)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = self._since = time.perf_counter()
        if not self._restored and trainer.is_global_zero:
            # Removes rows of a run that was killed before its first save.
            for logger in self._files():
                logger.rewind(self.start.written)
        if trainer.is_global_zero:
            self._replay()

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        # When the batch ends, the schedule has already set the rate of the next step.
        if (trainer.global_step + 1) % self.every_n_steps == 0:
            self._rates = _learning_rates(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._images += len(batch[0])
        step = trainer.global_step
        if step % self.every_n_steps != 0 or step == self._row_step:
            return
        self._row_step = step
        row = _of_all_ranks({n: value for n, value in trainer.callback_metrics.items() if n.startswith("train/")})
        now = time.perf_counter()
        rate = self._images * trainer.world_size / max(now - self._since, 1e-9)
        self._since, self._images = now, 0
        rates = {name: float(value) for name, value in (self._rates or _learning_rates(trainer)).items()}
        self.write(trainer, {**row, **rates, "train/images_per_s": rate})

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._write_split(trainer, "val/")
        self._since, self._images = time.perf_counter(), 0

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write_split(trainer, "test/")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        close(self._files(), error=exception)  # the other loggers belong to the run, which closes them

    def state_dict(self) -> dict[str, Any]:
        positions = [logger.position() for logger in self._files()]
        return {"positions": positions, "row_step": self._row_step, "elapsed_s": self.elapsed_s}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = True
        self._row_step = int(state_dict["row_step"])
        self._earlier_s = float(state_dict["elapsed_s"])
        for logger, position in zip(self._files(), state_dict["positions"], strict=True):
            logger.rewind(int(position))

    def _write_split(self, trainer: pl.Trainer, prefix: str) -> None:
        metrics = trainer.callback_metrics
        self.write(trainer, {name: float(value) for name, value in metrics.items() if name.startswith(prefix)})

    def _replay(self) -> None:
        """Give W&B the rows that were written before this process and are kept, since its run may lack some."""
        runs = [logger for logger in self.loggers if isinstance(logger, WandbRun)]
        for file in self._files() if runs else ():
            rows, _ = read_metrics(file.path)
            for run in runs:
                run.replay(rows)

    def _files(self) -> list[JsonlLogger]:
        return [logger for logger in self.loggers if isinstance(logger, JsonlLogger)]


def _of_all_ranks(row: Mapping[str, Tensor]) -> dict[str, float]:
    """The means over all ranks, which have equal shares of a batch; all ranks must call this at the same steps."""
    if world_size() == 1 or not row:
        return {name: float(value) for name, value in row.items()}
    means = mean_of_ranks(torch.stack([value.double() for value in row.values()]))
    return dict(zip(row, means.tolist(), strict=True))


def _learning_rates(trainer: pl.Trainer) -> dict[str, float | Tensor]:
    """``train/lr`` of the first parameter group, and ``train/lr/<name>`` of each that started with another rate.

    A rate that is a tensor is copied where it lies, since a schedule changes it in place.
    """
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    initial = [group.get("initial_lr", group["lr"]) for group in groups]
    rates = {"train/lr": groups[0]["lr"]}
    for i, group in enumerate(groups):
        if initial[i] != initial[0]:
            rates[f"train/lr/{group.get('name', i)}"] = group["lr"]
    return {name: rate.clone() if isinstance(rate, Tensor) else float(rate) for name, rate in rates.items()}
