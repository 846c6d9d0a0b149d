"""When a run is saved, so that a kill at any moment costs only time.

Lightning restores its own counters, optimizers and schedules, but the result is exact only if the run was saved at the
right moment:

- At the end of a batch, after all other callbacks: Lightning resumes with the next batch. (Callbacks of type
  ``Checkpoint`` are called last, at any place in the list.)
- Not after the last batch of an epoch: Lightning would skip that epoch's validation when it resumes. The run is saved
  at the end of the epoch instead, after validation.
- Not in the middle of gradient accumulation, since gradients are not part of a checkpoint.

Files that were written between a save and a kill are corrected by what writes them; see ``MetricLog``.
"""

import logging
from pathlib import Path
from typing import Any, final

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint

from qtrain.training.checkpoint import IDENTITY, list_resume_points, remove_unfinished, resume_point_name
from qtrain.training.optim import still_accumulating
from qtrain.utils.checks import check_range
from qtrain.utils.compat import restore_loader_position_

log = logging.getLogger(__name__)


@final
class ResumePoints(Checkpoint):
    """Writes ``folder/step-XXXXXXXX.ckpt`` every ``every_n_steps`` optimizer steps and at each epoch's end.

    The newest ``keep`` files are kept. ``identity`` is a string that two runs have in common if one may continue the
    other (a hash of the config); :class:`AtomicCheckpointIO` refuses a file of another one.
    """

    def __init__(self, *, folder: str | Path, every_n_steps: int = 200, keep: int = 2, identity: str = "") -> None:
        super().__init__()
        check_range("ResumePoints", "[1, inf)", every_n_steps=every_n_steps)
        check_range("ResumePoints", "[2, inf)", keep=keep, hint="if the newest file is damaged, another is needed")
        self.folder = Path(folder)
        self.every_n_steps = every_n_steps
        self.keep = keep
        self.identity = identity
        self._saved_step = -1

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if trainer.val_check_interval != 1.0 or trainer.check_val_every_n_epoch is None:
            raise ValueError(
                f"ResumePoints: validation must run at the end of epochs for exact resumption, but "
                f"trainer.val_check_interval is {trainer.val_check_interval} and check_val_every_n_epoch "
                f"{trainer.check_val_every_n_epoch}; set 1.0 and an integer"
            )
        if trainer.is_global_zero:
            remove_unfinished(self.folder)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        restore_loader_position_(trainer)
        first = trainer.strategy.broadcast(trainer.global_step)
        if first != trainer.global_step:
            # A shared file system may show a file on one machine before another; a new start helps.
            raise RuntimeError(
                f"ResumePoints: rank {trainer.global_rank} resumes at step {trainer.global_step}, rank 0 at {first}; "
                f"do all machines see the same files in {self.folder}? Start again"
            )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every_n_steps == 0:
            self.save_within_epoch(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save(trainer)

    def save_within_epoch(self, trainer: pl.Trainer) -> bool:
        """Save in ``on_train_batch_end`` if the run can be saved after this batch; returns whether it was."""
        if trainer.is_last_batch or still_accumulating(trainer):
            return False
        self._save(trainer)
        return True

    def _save(self, trainer: pl.Trainer) -> None:
        step = trainer.global_step
        if step == self._saved_step:
            return
        path = self.folder / resume_point_name(step)
        trainer.save_checkpoint(path, weights_only=False)
        self._saved_step = step
        log.debug("saved %s", path)
        if trainer.is_global_zero:
            self._prune(step)

    def _prune(self, step: int) -> None:
        # Files of later steps were skipped as damaged when this run resumed, so its own files are better.
        points = list_resume_points(self.folder)
        kept = {path for _, path in [point for point in points if point[0] <= step][-self.keep :]}
        for _, path in points:
            if path not in kept:
                path.unlink(missing_ok=True)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[IDENTITY] = self.identity

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._saved_step = int(checkpoint["global_step"])
