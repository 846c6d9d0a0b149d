"""A training run of half a second, to be killed: what ``test_resume.py`` starts, kills and starts again.

Run as a script it is a small server: each line of stdin is a job (JSON), each job runs in a fork of this process, so
that torch is imported once. The answer is the exit status of the fork.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from qtrain.config.compose import compose
from qtrain.pipeline import build_teacher, prepare
from qtrain.pipeline.build_model import build_model
from qtrain.pipeline.fit import fit
from qtrain.pipeline.load_data import load_data
from qtrain.spec import Batch
from qtrain.tracking.loggers import JsonlLogger
from qtrain.tracking.metric_log import MetricLog
from qtrain.training import checkpoint
from qtrain.training.callbacks.average import WeightAverage
from qtrain.training.callbacks.signals import StopOnSignal
from qtrain.training.checkpoint import AtomicCheckpointIO, find_resume_point
from qtrain.training.module import QATModule
from qtrain.training.resume import ResumePoints
from qtrain.utils.errors import RunInterruptedError

SAMPLES, BATCH, EPOCHS = 56, 8, 3
STEPS_PER_EPOCH = SAMPLES // BATCH
EVERY = 3  # resume points at steps 3, 6, (7 = epoch's end), 9, 12, ...


def samples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(SAMPLES, 1, 6, 6, generator=generator), torch.randint(0, 3, (SAMPLES,), generator=generator)


def evaluation_batches() -> DataLoader:
    image, target = samples()
    batches = [Batch(image[i::2], target[i::2], torch.arange(SAMPLES)[i::2]) for i in range(2)]
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


class Loader:
    """Batches of a fixed random set, shuffled by (seed, epoch); resumable as the data modules' loaders are."""

    def __init__(self) -> None:
        self.image, self.target = samples()
        self.epoch = self.place = 0
        self.resumed = False

    @property
    def sampler(self) -> Loader:
        return self

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.place, self.resumed = epoch, 0, False

    def __len__(self) -> int:
        return STEPS_PER_EPOCH

    def __iter__(self) -> Iterator[Batch]:
        self.place = self.place if self.resumed else 0
        self.resumed = False
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(self.epoch))
        while self.place < len(self):
            index = order[self.place * BATCH : (self.place + 1) * BATCH]
            self.place += 1
            yield Batch(self.image[index], self.target[index], index)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.place, self.resumed = state["epoch"], state["place"], True


class Tiny(pl.LightningModule):
    """Convolution, batch norm, dropout, a metric and an integer buffer: each kind of state that a run can lose."""

    def __init__(self, *, estimate: bool) -> None:
        super().__init__()
        self.estimate = estimate
        torch.manual_seed(0)
        self.student = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(64, 3)
        )
        self.student.register_buffer("bits", torch.tensor(4))
        self.top1 = MulticlassAccuracy(num_classes=3)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        torch.manual_seed(self.global_step)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.student(batch.image), batch.target)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("test", batch)

    def _evaluate(self, split: str, batch: Batch) -> None:
        logits = self.student(batch.image)
        self.log(f"{split}/loss", nn.functional.cross_entropy(logits, batch.target), batch_size=len(batch.index))
        self.top1.update(logits, batch.target)

    def on_validation_epoch_end(self) -> None:
        self.log("val/top1", self.top1.compute())
        self.top1.reset()

    def on_test_epoch_end(self) -> None:
        self.log("test/top1", self.top1.compute())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.student.parameters(), lr=0.02)
        # Asking makes Lightning build the loaders earlier than otherwise, before a checkpoint is read.
        total = self.trainer.estimated_stepping_batches if self.estimate else EPOCHS * STEPS_PER_EPOCH
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / (total + 1))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Saboteur(pl.Callback):
    """Kills the process at ``moment``; called before ``ResumePoints``, as every ordinary callback is."""

    def __init__(self, moment: str, step: int, folder: Path) -> None:
        self.moment, self.step, self.folder = moment, step, folder

    def hit(self, moment: str, trainer: pl.Trainer) -> bool:
        return moment == self.moment and trainer.global_step == self.step

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if self.hit("batch_start", trainer):
            kill()

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if self.hit("batch_end", trainer):
            kill()
        if self.hit("half_row", trainer):
            with (self.folder / "metrics.jsonl").open("ab") as file:
                file.write(b'{"step": 5, "epo')
            kill()
        if self.hit("sigterm", trainer):
            os.kill(os.getpid(), signal.SIGTERM)
        if self.hit("sigint", trainer):
            os.kill(os.getpid(), signal.SIGINT)

    def on_validation_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if self.hit("validation", trainer):
            kill()
        if self.hit("sigterm_in_validation", trainer):
            os.kill(os.getpid(), signal.SIGTERM)

    def on_train_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if self.hit("train_end", trainer):
            kill()

    def on_test_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if self.hit("test", trainer):
            kill()


class LateSaboteur(Checkpoint):
    """The same after ``ResumePoints`` and after a row was written."""

    def __init__(self, moment: str, step: int) -> None:
        self.moment, self.step = moment, step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if self.moment == "after_save" and trainer.global_step == self.step:
            kill()

    def on_validation_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if self.moment == "after_validation" and trainer.global_step == self.step:
            kill()

    def on_train_epoch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if self.moment == "after_epoch" and trainer.global_step == self.step:
            kill()


def sabotage_writes(moment: str, step: int) -> None:
    """Die in the middle of the checkpoint of ``step``, or between its last byte and its name."""
    save, replace = torch.save, os.replace

    def half_save(state: dict[str, Any], path: Path) -> None:
        save(state, path)
        if moment == "mid_write" and state["global_step"] == step:
            os.truncate(path, path.stat().st_size // 2)
            kill()

    def no_replace(source: str, target: str | Path) -> None:
        if moment == "before_rename" and f"step-{step:08d}" in str(target):
            kill()
        replace(source, target)

    checkpoint.torch.save = half_save  # type: ignore[assignment]
    checkpoint.os.replace = no_replace  # type: ignore[assignment]


def run(job: dict[str, Any]) -> int:
    """One attempt at the run in ``job["folder"]``; writes ``final.json`` when it gets to the end."""
    torch.set_num_threads(1)
    folder = Path(job["folder"])
    moment, step = job.get("moment", ""), job.get("step", -1)
    sabotage_writes(moment, step)
    metric_log = MetricLog(loggers=[JsonlLogger(folder=folder)], every_n_steps=2)
    points = ResumePoints(folder=folder / "checkpoints", every_n_steps=EVERY, identity="tiny")
    # Deliberately in a bad order: what saves must come last whatever the list says.
    callbacks = [points, StopOnSignal(resume_points=points), LateSaboteur(moment, step), metric_log]
    callbacks += [WeightAverage(decay=0.9)] if job.get("average") else []
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        logger=False,
        callbacks=[*callbacks, Saboteur(moment, step, folder)],
        plugins=[AtomicCheckpointIO()],
        accumulate_grad_batches=job.get("accumulate", 1),
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Tiny(estimate=job.get("estimate", False))
    validation = evaluation_batches() if job.get("validate", True) else None
    try:
        trainer.fit(module, Loader(), validation, ckpt_path=find_resume_point(points.folder))
    except RunInterruptedError as interrupted:
        return interrupted.exit_code
    trainer.test(module, evaluation_batches(), verbose=False)
    optimizer = trainer.optimizers[0].state_dict()
    final = {
        "weights": digest(module.state_dict()),
        "average": digest(module.student.state_dict()),
        "optimizer": digest(optimizer["state"]),
        "lr": optimizer["param_groups"][0]["lr"],
        "step": trainer.global_step,
        "epoch": trainer.current_epoch,
    }
    (folder / "final.json").write_text(json.dumps(final))
    return 0


PRODUCT = (
    "model=cifar_resnet8",
    "teacher=cifar_resnet20",
    "objective=soft_hint",
    "distill.student_layers=[layer3]",
    "distill.teacher_layers=[layer3]",
    "data.max_train=160",
    "data.val_fraction=0.2",
    "data.batch_size=32",
    "data.mixup=0.2",
    "fit.epochs=3",
    "fit.weight_average=0.9",
    "fit.scale_lr=0.001",
    "fit.checkpoint_every_steps=3",
    "fit.log_every_steps=1",
    "fit.health_every_steps=2",
    "+callback@callbacks.instability=instability",
    "callbacks.instability.every_n_steps=2",
    "trainer=cpu",
)
"""Low-bit student, teacher, hints with a regressor, mixed images, all that looks at layers: four steps an epoch."""


def run_product(job: dict[str, Any]) -> int:
    """The same for what ``task=train`` fits, put together by the functions that it uses."""
    torch.set_num_threads(1)
    folder = Path(job["folder"])
    moment, step = job.get("moment", ""), job.get("step", -1)
    sabotage_writes(moment, step)
    training_step = QATModule.training_step

    def perhaps_the_last_step(module: QATModule, batch: Batch, batch_idx: int) -> Tensor:
        if moment == "batch_start" and module.global_step == step:
            kill()
        return training_step(module, batch, batch_idx)

    QATModule.training_step = perhaps_the_last_step  # type: ignore[method-assign]
    cfg = compose(PRODUCT)
    data = load_data(cfg)
    torch.manual_seed(0)
    student = prepare.prepare_student(cfg, build_model(cfg.model, data.info), data).student
    teacher_model = build_model(cfg.teacher.model, data.info)
    objective = build_teacher.build_objective(cfg, student, teacher_model, data)
    module = QATModule(
        student=student,
        objective=objective,
        teacher=build_teacher.build_teacher(cfg, teacher_model, objective, data),
        optimizer=cfg.optimizer.build(),
        lr_schedule=cfg.lr_schedule.build(),
        num_classes=data.info.num_classes,
        seed=cfg.seed,
        scale_lr=cfg.fit.scale_lr,
    )
    result = fit(
        cfg, module=module, data=data, folder=folder, identity="product", epochs=cfg.fit.epochs, title="product"
    )
    states = {"average": digest(student.state_dict()), "all": digest(module.state_dict())}
    final = states | {"steps": result.state.end.step}
    (folder / "final.json").write_text(json.dumps(final))
    return 0


def digest(state: Any) -> str:
    """A hash of every bit of every tensor in nested dicts."""
    digest = hashlib.sha256()

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            for key in sorted(value, key=str):
                digest.update(str(key).encode())
                walk(value[key])
        elif isinstance(value, Tensor):
            digest.update(str(value.dtype).encode() + value.detach().contiguous().view(-1).numpy().tobytes())
        else:
            digest.update(repr(value).encode())

    walk(state)
    return digest.hexdigest()


def serve() -> None:
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            try:
                status = (run_product if job.get("product") else run)(job)
            except BaseException:
                traceback.print_exc()
                status = 99
            os._exit(status)
        if "timer_s" in job:
            time.sleep(job["timer_s"])
            os.kill(child, signal.SIGKILL)
        # Negative for a signal, as in subprocess.
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps({"status": status}), flush=True)


if __name__ == "__main__":
    serve()
