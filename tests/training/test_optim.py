"""When an optimizer step follows a batch, and that it takes torch's kernels for whole steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from qtrain.training.optim import still_accumulating, use_fused_


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


def trained(make: Callable[..., torch.optim.Optimizer], *, fused: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(5, 3, dtype=dtype))
    optimizer = make([{"params": [weight], "weight_decay": 0.01}])
    if fused:
        use_fused_(optimizer)
    assert bool(optimizer.param_groups[0].get("fused")) == fused
    for step in range(5):
        weight.grad = torch.sin(weight.detach() * (step + 1))
        optimizer.step()
    return weight.detach()


MAKERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.1),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.1),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True),
}


@pytest.mark.parametrize("name", MAKERS)
def test_kernels_for_whole_steps_take_the_same_steps(name: str) -> None:
    own, plain = (trained(MAKERS[name], fused=fused, dtype=torch.float64) for fused in (True, False))
    torch.testing.assert_close(own, plain, rtol=1e-12, atol=1e-12)
    assert not hasattr(MAKERS[name]([nn.Parameter(torch.ones(1))]), "_step_supports_amp_scaling"), (
        "or Lightning refuses to clip gradients in mixed precision"
    )


class Share(Tensor):
    """Stands for what is no plain tensor, such as a rank's share of one."""


@pytest.mark.parametrize(
    ("parameter", "options", "fused"),
    [
        (torch.ones(2), {}, True),
        (torch.ones(2), {"fused": False}, False),
        (torch.ones(2), {"foreach": True}, None),
        (torch.ones(2, dtype=torch.complex64), {}, None),
        (torch.ones(2).as_subclass(Share), {}, None),
    ],
)
def test_an_own_choice_stays_and_what_has_no_kernel_goes_without(
    parameter: Tensor, options: dict[str, Any], fused: bool | None
) -> None:
    optimizer = torch.optim.Adam([parameter.requires_grad_()], **options)
    use_fused_(optimizer)
    assert optimizer.param_groups[0]["fused"] is fused


def test_an_optimizer_without_such_kernels_stays_as_it_is() -> None:
    optimizer = torch.optim.RMSprop([torch.ones(2, requires_grad=True)])
    use_fused_(optimizer)
    assert "fused" not in optimizer.param_groups[0]
