"""Optimizers step by torch's kernels for a whole step: the same steps, whatever the strides, also after resuming."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from qtrain.training.fused import use_fused_

Make = Callable[..., torch.optim.Optimizer]
MAKERS: dict[str, Make] = {
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.1, weight_decay=0.01),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True),
}


def parameters(*, channels_last: bool) -> list[nn.Parameter]:
    """A filter bank, a vector and a scale, of 64 bits."""
    drawn = torch.Generator().manual_seed(0)
    bank = torch.randn(6, 4, 3, 3, dtype=torch.float64, generator=drawn)
    vector, scale = (torch.randn(shape, dtype=torch.float64, generator=drawn) for shape in ((5,), ()))
    bank = bank.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    return [nn.Parameter(bank), nn.Parameter(vector), nn.Parameter(scale)]


def take_steps_(optimizer: torch.optim.Optimizer, steps: Iterable[int], *, closure: bool = False) -> None:
    """Steps along gradients that are contiguous, as those from other ranks are.

    They are there before, or a ``closure`` makes them, as Lightning does. The vector's gradient comes from the third
    step on.
    """
    for step in steps:

        def gradients(step: int = step) -> Tensor:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
                    if parameter.ndim != 1 or step >= 2:
                        parameter.grad = torch.sin(parameter.detach() * (step + 1)).contiguous()
            return torch.tensor(float(step))

        if closure:
            assert optimizer.step(gradients) == step  # type: ignore[arg-type, comparison-overlap]
        else:
            gradients()
            optimizer.step()


def fused(make: Make, trained: list[nn.Parameter]) -> torch.optim.Optimizer:
    """An optimizer of two groups that steps by kernels."""
    optimizer = make([{"params": trained[:1]}, {"params": trained[1:]}])
    use_fused_(optimizer)
    assert [group["fused"] for group in optimizer.param_groups] == [True, True]
    return optimizer


def assert_same(one: Iterable[Tensor], other: Iterable[Tensor]) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", MAKERS)
def test_kernels_take_the_steps_of_the_loop(name: str, channels_last: bool, closure: bool) -> None:
    own, expected = parameters(channels_last=channels_last), parameters(channels_last=False)
    take_steps_(fused(MAKERS[name], own), range(5), closure=closure)
    take_steps_(MAKERS[name](expected), range(5))
    assert_same(own, expected)


class Regression(pl.LightningModule):
    """A convolution in channels-last order, whose gradient another rank has laid out otherwise."""

    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.fused = fused

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        if self.fused:
            use_fused_(optimizer)
        return optimizer

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.convolution(batch).square().mean()
        return loss

    def on_after_backward(self) -> None:
        assert self.convolution.weight.grad is not None
        self.convolution.weight.grad = self.convolution.weight.grad.contiguous()


def test_lightning_takes_the_same_steps_and_clips_gradients() -> None:
    trained = []
    for fused in (True, False):
        torch.manual_seed(0)
        module = Regression(fused=fused)
        trainer = pl.Trainer(
            accelerator="cpu", devices=1, barebones=True, max_epochs=1, gradient_clip_val=0.01, precision="bf16-mixed"
        )
        trainer.fit(module, DataLoader(torch.randn(12, 3, 8, 8), batch_size=3))  # type: ignore[arg-type]
        trained.append(module.convolution.weight.detach())
    torch.testing.assert_close(*trained, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("before", ["loop", "kernels"])
@pytest.mark.parametrize("after", ["loop", "kernels"])
@pytest.mark.parametrize("name", MAKERS)
def test_a_state_says_nothing_of_kernels_and_fits_both(name: str, after: str, before: str, channels_last: bool) -> None:
    """Saved with contiguous moments, as other ranks do, and gone on with beside parameters of other strides."""

    def optimizer(way: str, trained: list[nn.Parameter]) -> torch.optim.Optimizer:
        return fused(MAKERS[name], trained) if way == "kernels" else MAKERS[name](
            [{"params": trained[:1]}, {"params": trained[1:]}]
        )  # fmt: skip

    first, expected = parameters(channels_last=False), parameters(channels_last=False)
    one = optimizer(before, first)
    take_steps_(one, range(3))
    state = deepcopy(one.state_dict())
    assert [group["fused"] for group in state["param_groups"]] == [None, None]
    second = parameters(channels_last=channels_last)
    for parameter, value in zip(second, first, strict=True):
        parameter.data.copy_(value.data)
    other = optimizer(after, second)
    other.load_state_dict(state)
    assert [group["fused"] for group in other.param_groups] == [True if after == "kernels" else None] * 2
    take_steps_(other, range(3, 6))
    take_steps_(MAKERS[name](expected), range(6))
    assert_same(second, expected)


def test_lightning_finds_no_reason_to_refuse_clipping_in_mixed_precision() -> None:
    """What it looks for in float16 on a GPU."""
    assert not hasattr(fused(MAKERS["adam"], parameters(channels_last=False)), "_step_supports_amp_scaling")


class Share(Tensor):
    """Stands for what is no plain tensor, such as a rank's share of one."""


@pytest.mark.parametrize(
    ("parameter", "options", "expected"),
    [
        (torch.ones(2), {}, True),
        (torch.ones(2), {"fused": False}, False),
        (torch.ones(2), {"foreach": True}, None),
        (torch.ones(2), {"differentiable": True}, None),
        (torch.ones(2, dtype=torch.complex64), {}, None),
        (torch.ones(2).as_subclass(Share), {}, None),
        (torch.ones(4, 4)[:, :2], {}, None),
    ],
    ids=["plain", "refused", "foreach", "differentiable", "complex", "share", "holes"],
)
def test_an_own_choice_stays_and_what_has_no_kernel_goes_without(
    parameter: Tensor, options: dict[str, Any], expected: bool | None
) -> None:
    optimizer = torch.optim.Adam([parameter.requires_grad_()], **options)
    use_fused_(optimizer)
    assert optimizer.param_groups[0]["fused"] is expected
    assert optimizer.state_dict()["param_groups"][0]["fused"] is (None if expected else expected)


@pytest.mark.parametrize(
    "make",
    [
        torch.optim.RMSprop,
        lambda parameters: torch.optim.SGD(parameters, momentum=0.9, dampening=0.1),
        torch.optim.Adagrad,
    ],
    ids=["no kernel", "dampening", "counters that are there already"],
)
def test_an_optimizer_that_kernels_do_not_suit_stays_as_it_is(make: Make) -> None:
    parameter = torch.ones(2, requires_grad=True)
    optimizer = make([parameter])
    use_fused_(optimizer)
    assert not optimizer.param_groups[0].get("fused")
    parameter.grad = torch.ones(2)
    optimizer.step()
