"""Exact resumption under Lightning: a run stopped after any batch goes on with precisely the batches that remained."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from qtrain.data.base import VisionData
from qtrain.data.digits import Digits
from qtrain.data.loader import EpochLoader
from qtrain.data.parquet import ParquetImages
from qtrain.spec import Batch

EPOCHS = 3


class Recorder(pl.LightningModule):
    """A linear classifier that notes what it was given, and saves a checkpoint after batch ``save_at``."""

    def __init__(self, inputs: int, classes: int, save_at: int | None = None, path: Path | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layer = nn.Linear(inputs, classes)
        self.save_at, self.path = save_at, path
        self.seen: list[tuple[int, int, list[int], float]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        checksum = batch.image.double().sum().item()
        self.seen.append((self.current_epoch, batch_idx, batch.index.tolist(), checksum))
        return nn.functional.cross_entropy(self.layer(batch.image.flatten(1)), batch.target)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        assert not self.training

    def on_train_batch_end(self, outputs: object, batch: object, batch_idx: int) -> None:
        if self.trainer.global_step == self.save_at:
            self.trainer.save_checkpoint(str(self.path))

    def on_train_epoch_end(self) -> None:
        if self.save_at == -self.current_epoch - 1:
            self.trainer.save_checkpoint(str(self.path))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def digits(_: Path, **options: float) -> VisionData:
    return Digits(batch_size=64, max_train=256 + 20, crop_padding=1, mixup=0.2, **options)  # type: ignore[arg-type]


def streaming(root: Path, **options: float) -> VisionData:
    return ParquetImages(  # type: ignore[misc]
        name="tiny",
        root=str(root),
        test_split="test",
        batch_size=8,
        image_size=12,
        auto_augment="rand-m9-mstd0.5",
        re_prob=0.5,
        cutmix=1.0,
        cache_dir=str(root / "mapped"),
        **{"workers": 0, **options},  # type: ignore[arg-type]
    )


def fit(data: VisionData, model: Recorder, checkpoint: Path | None = None) -> None:
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=EPOCHS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model, datamodule=data, ckpt_path=None if checkpoint is None else str(checkpoint))


def recorder(data: VisionData, save_at: int | None = None, path: Path | None = None) -> Recorder:
    data.setup()
    return Recorder(data.info.in_channels * data.info.image_size**2, data.info.num_classes, save_at, path)


@pytest.mark.parametrize("val_fraction", [0.0, 0.25])
@pytest.mark.parametrize("make", [digits, streaming])
@pytest.mark.parametrize("save_at", [1, 3, "epoch", "epoch end", "later"])
def test_resumed_run_equals_the_undisturbed_one(
    make: Callable[..., VisionData], val_fraction: float, save_at: int | str, parquet_root: Path, tmp_path: Path
) -> None:
    """``save_at``: after that many steps, after the first epoch's last batch or its end hooks, or in the second."""
    data = make(parquet_root, val_fraction=val_fraction)
    data.setup()
    steps = len(data.train_dataloader())
    point = {"epoch": steps, "epoch end": -1, "later": steps + 2}.get(save_at, save_at)  # type: ignore[call-overload]

    whole = recorder(data, point, tmp_path / "some.ckpt")
    fit(data, whole)
    assert [len(whole.seen), whole.seen[-1][:2]] == [steps * EPOCHS, (EPOCHS - 1, steps - 1)]
    torch.load(tmp_path / "some.ckpt", weights_only=True)

    fresh = make(parquet_root, val_fraction=val_fraction)
    resumed = recorder(fresh)
    torch.manual_seed(12345)  # what the global generators hold is of no account
    fit(fresh, resumed, tmp_path / "some.ckpt")
    assert resumed.seen == whole.seen[steps if point == -1 else point :]
    assert torch.equal(resumed.layer.weight, whole.layer.weight)


def test_another_number_of_workers_resumes_too(parquet_root: Path, tmp_path: Path) -> None:
    whole = recorder(streaming(parquet_root), 8, tmp_path / "some.ckpt")
    fit(streaming(parquet_root), whole)
    resumed = recorder(streaming(parquet_root))
    fit(streaming(parquet_root, workers=2), resumed, tmp_path / "some.ckpt")
    assert resumed.seen == whole.seen[8:]
    assert torch.equal(resumed.layer.weight, whole.layer.weight)


def indices(loader: EpochLoader) -> list[list[int]]:
    return [batch.index.tolist() for batch in loader]


@pytest.mark.parametrize("make", [digits, streaming])
def test_loader_resumes_without_lightning(make: Callable[..., VisionData], parquet_root: Path) -> None:
    """The contract without Lightning, its odd order of calls included."""
    data = make(parquet_root)
    data.setup()
    loader = data.train_dataloader()
    loader.set_epoch(1)
    whole = indices(loader)
    iterator = iter(loader)
    for _ in range(2):
        next(iterator)
    state = loader.state_dict()
    assert all(type(value) is int for value in state.values())

    resumed = data.train_dataloader()
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    iterator = iter(resumed)  # Lightning makes the iterator before it names the epoch
    resumed.sampler.set_epoch(1)
    assert [batch.index.tolist() for batch in iterator] == whole[2:]
    assert indices(resumed) == whole, "only the first pass is a rest"

    another = data.train_dataloader()
    another.load_state_dict(state)
    another.set_epoch(2)
    assert len(indices(another)) == len(another), "another epoch than the state's starts at its beginning"


def test_state_of_another_order_is_refused() -> None:
    data, other = (Digits(batch_size=size) for size in (64, 32))
    data.setup()
    other.setup()
    with pytest.raises(ValueError, match="batch_size was 64 when the checkpoint was written and is 32 now; restore it"):
        other.train_dataloader().load_state_dict(data.train_dataloader().state_dict())
