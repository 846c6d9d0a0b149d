"""Progress of a fit: a bar on a terminal, or a line every ten seconds in a log file.

The loss is read from the device only when something is shown, so steps do not wait for it.
"""

import logging
import math
import sys
import time
from typing import Any, final

import pytorch_lightning as pl
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress
from torch import Tensor

from qtrain.utils.progress import duration

log = logging.getLogger(__name__)


COMPILING = "compiling the training step, which takes a while; the time left follows"


def progress_line(
    *, epoch: int, epochs: int, step: int, steps: int, loss: float, images_per_s: float, left_s: float
) -> str:
    """``epoch 3/20  step 120/2000  loss 0.512  3500 images/s  1:20 left``; epochs count from 1 here."""
    return (
        f"epoch {epoch}/{epochs}  step {step}/{steps}  loss {loss:.4g}  {images_per_s:.0f} images/s  "
        f"{duration(left_s)} left"
    )


@final
class Progress(pl.Callback):
    """Shows epoch, step, loss, images per second and time left on rank 0, under ``title``.

    ``bar=None`` shows a bar if stderr is a terminal. ``every_s`` is the time between two plain lines. Throughput and
    time left are estimated from the training of this process so far, including validation. A fit whose step is compiled
    says so first, and its first batch does not count.
    """

    def __init__(self, *, title: str = "", bar: bool | None = None, every_s: float = 10.0) -> None:
        super().__init__()
        if every_s <= 0:
            raise ValueError(f"Progress: every_s must be positive, got {every_s}")
        self.title = title
        self.bar = sys.stderr.isatty() if bar is None else bar
        self.every_s = 0.5 if self.bar else every_s
        self._rich: RichProgress | None = None
        self._images = self._first_step = self._total = 0
        self._began = self._started = self._shown = 0.0
        self._compiling = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        self._began = self._started = self._shown = time.perf_counter()
        self._images, self._first_step = 0, trainer.global_step
        self._compiling = bool(getattr(pl_module, "compiles", False))
        self._total = int(trainer.estimated_stepping_batches)
        if self.bar:
            columns = (TextColumn("{task.fields[title]}"), BarColumn(), TextColumn("{task.description}"))
            self._rich = RichProgress(*columns, console=Console(stderr=True, force_terminal=True), transient=True)
            said = COMPILING if self._compiling else ""
            self._rich.add_task(said, total=self._total, completed=self._first_step, title=self.title)
            self._rich.start()
        elif self._compiling:
            log.info("%s%s", f"{self.title}: " if self.title else "", COMPILING)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.is_global_zero:
            return
        now = time.perf_counter()
        if self._compiling:  # the first batch took minutes that no other will take
            self._compiling = False
            self._started, self._first_step = now, trainer.global_step
            return
        self._images += len(batch[0]) * trainer.world_size
        if now - self._shown >= self.every_s:
            self._shown = now
            self._show(trainer, outputs)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()
        if trainer.is_global_zero:
            log.info("%s: %d steps in %s", self.title or "fit", trainer.global_step, self._elapsed())

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close()

    def _show(self, trainer: pl.Trainer, outputs: Any) -> None:
        elapsed = time.perf_counter() - self._started
        done = trainer.global_step - self._first_step
        line = progress_line(
            epoch=trainer.current_epoch + 1,
            epochs=_epochs(trainer, self._total),
            step=trainer.global_step,
            steps=self._total,
            loss=_loss(outputs),
            images_per_s=self._images / elapsed,
            left_s=elapsed / max(done, 1) * (self._total - trainer.global_step),
        )
        if self._rich is None:
            log.info("%s%s", f"{self.title}: " if self.title else "", line)
        else:
            self._rich.update(self._rich.task_ids[0], completed=trainer.global_step, description=line)

    def _elapsed(self) -> str:
        return duration(time.perf_counter() - self._began)

    def _close(self) -> None:
        if self._rich is not None:
            self._rich.stop()
            self._rich = None


def _epochs(trainer: pl.Trainer, steps: int) -> int:
    """The number of epochs that the fit will begin; Lightning has -1 if a number of steps ends the fit."""
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        return trainer.max_epochs
    return math.ceil(steps * trainer.accumulate_grad_batches / max(1, int(trainer.num_training_batches)))


def _loss(outputs: Any) -> float:
    loss = outputs["loss"] if isinstance(outputs, dict) else outputs
    return float(loss) if isinstance(loss, Tensor | float) else float("nan")
