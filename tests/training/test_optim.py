"""When an optimizer step follows a batch."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from qtrain.training.optim import still_accumulating


class Linear(pl.LightningModule):
    """Notes after each batch whether a step was to follow and how many there were."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.expected: list[bool] = []
        self.stepped: list[bool] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.before = self.global_step
        self.expected.append(not still_accumulating(self.trainer))
        loss: Tensor = self.layer(batch).square().mean()
        return loss

    def on_train_batch_end(self, outputs: object, batch: Tensor, batch_idx: int) -> None:
        self.stepped.append(self.global_step > self.before)


@pytest.mark.parametrize("limit", [1.0, 4])
def test_still_accumulating_tells_after_which_batches_lightning_steps(limit: float) -> None:
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, barebones=True, max_epochs=2, accumulate_grad_batches=3, limit_train_batches=limit
    )
    module = Linear()
    trainer.fit(module, DataLoader(torch.ones(7, 2), batch_size=1))  # type: ignore[arg-type]
    epoch = [False, False, True, False, False, True, True] if limit == 1.0 else [False, False, True, True]
    assert module.stepped == epoch * 2
    assert module.expected == module.stepped
