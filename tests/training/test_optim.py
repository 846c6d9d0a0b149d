"""When an optimizer step follows a batch, and which weights decay."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from qtrain.nn import QuantLinear
from qtrain.quantizers.codebook.kmeans import KMeans
from qtrain.quantizers.codebook.product import Product
from qtrain.quantizers.uniform.lsq import LSQ
from qtrain.quantizers.wrappers.pruned import Pruned
from qtrain.quantizers.wrappers.quant_noise import QuantNoise
from qtrain.spec import QuantSpec
from qtrain.training.optim import parameter_groups, still_accumulating


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


@pytest.mark.parametrize(
    ("make", "decays"),
    [
        (partial(KMeans, train="centroids"), False),
        (partial(KMeans, train="both"), True),
        (partial(Product, train="centroids"), False),
        (partial(Product, train="centroids", start=0.5), True),
        (partial(Pruned, quantizer=KMeans), False),
        (partial(QuantNoise, quantizer=KMeans, rate=0.5), True),
        (LSQ, True),
    ],
)
def test_weights_that_stay_in_their_clusters_do_not_decay(make: Any, decays: bool) -> None:
    """Those have no gradient; decay alone would move them, and so into other clusters."""
    layer = QuantLinear(source=nn.Linear(8, 4))
    layer.weight_quantizer = make(spec=QuantSpec(bits=2, shape=(4, 8)))
    (name,) = [group["name"] for group in parameter_groups([layer]) for p in group["params"] if p is layer.weight]
    assert name == ("weights" if decays else "no_decay")
