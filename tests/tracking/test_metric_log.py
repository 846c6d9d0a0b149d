"""The rows of metrics: of which step each value is."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from qtrain.spec import Batch
from qtrain.tracking.loggers import JsonlLogger
from qtrain.tracking.metric_log import MetricLog
from qtrain.utils.json_lines import read_metrics

BATCHES = 8


class Scheduled(pl.LightningModule):
    """A weight and a scale with rates of their own, which fall by a cosine; ``used`` are those of each step."""

    def __init__(self, *, tensors: bool) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(()))
        self.tensors = tensors
        self.used: list[tuple[float, float]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(batch.image @ self.weight * self.scale, batch.target)

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        weight, scale = self.optimizers(use_pl_optimizer=False).param_groups
        self.used.append((float(weight["lr"]), float(scale["lr"])))
        super().optimizer_step(*arguments, **options)

    def configure_optimizers(self) -> Any:
        rates = (torch.tensor(rate) if self.tensors else rate for rate in (0.5, 0.125))
        groups = [
            {"params": [one], "name": name, "lr": rate}
            for one, name, rate in zip((self.weight, self.scale), ("weights", "scales"), rates, strict=True)
        ]
        optimizer = torch.optim.SGD(groups)
        falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.5 * (1 + math.cos(math.pi * k / BATCHES)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": falling, "interval": "step"}}


@pytest.mark.parametrize("tensors", [False, True])
@pytest.mark.parametrize(("every", "accumulated"), [(1, 1), (3, 1), (1, 2)])
def test_a_row_has_the_rate_that_its_step_was_made_with(
    tmp_path: Path, tensors: bool, every: int, accumulated: int
) -> None:
    """The rate of step k of n, counted from 1, is the first one times (1 + cos(pi (k - 1) / n)) / 2."""
    torch.manual_seed(0)
    images = [Batch(torch.randn(4), torch.tensor(i % 3), torch.tensor(i)) for i in range(BATCHES)]
    module = Scheduled(tensors=tensors)
    pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accumulate_grad_batches=accumulated,
        callbacks=[MetricLog(loggers=[JsonlLogger(folder=tmp_path)], every_n_steps=every)],
    ).fit(module, DataLoader(images, batch_size=1))  # fmt: skip
    rows, _ = read_metrics(tmp_path / "metrics.jsonl")
    told = {int(row["step"]): (row["lr"], row["lr/scales"]) for row in rows if row["step"]}
    assert list(told) == list(range(every, BATCHES // accumulated + 1, every))
    for step, rates in told.items():
        share = 0.5 * (1 + math.cos(math.pi * (step - 1) / BATCHES))
        assert rates == pytest.approx((0.5 * share, 0.125 * share))
        assert rates == pytest.approx(module.used[step - 1])
