"""Batch norm over all ranks, on one rank: the layer whose place it takes. Several: tests/distributed."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import nn

from qtrain.nn.folded import FoldedWeight
from qtrain.nn.sync_batchnorm import SyncBatchNorm, sync_batchnorm_

NORMS = {
    "2d": lambda: nn.BatchNorm2d(3),
    "1d": lambda: nn.BatchNorm1d(3),
    "mean of all": lambda: nn.BatchNorm2d(3, momentum=None),
    "plain": lambda: nn.BatchNorm2d(3, affine=False),
    "without statistics": lambda: nn.BatchNorm2d(3, track_running_stats=False),
    "with activation": lambda: BatchNormAct2d(3, act_layer=nn.ReLU),
}


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("together", [False, True], ids=["torch's", "its own"])
def test_on_one_rank_it_is_the_layer_that_it_replaces(
    kind: str, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``together`` takes the path of several ranks, whose collectives give back what they are given on one."""
    torch.manual_seed(0)
    shape = (8, 3) if kind == "1d" else (8, 3, 5, 5)
    model = nn.Sequential(nn.Identity(), NORMS[kind]()).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    other = copy.deepcopy(model)
    assert sync_batchnorm_(other) == 1
    assert isinstance(other[1], SyncBatchNorm)
    assert other.state_dict().keys() == model.state_dict().keys()
    if together:
        own = SyncBatchNorm._over_all_ranks
        monkeypatch.setattr(
            SyncBatchNorm, "forward", lambda self, x: nn.Sequential(*self.children())(own(self, x) if self.training else
            super(SyncBatchNorm, self).forward(x)),
        )  # fmt: skip
    for step in range(3):
        x = torch.randn(shape, dtype=torch.float64) * 3 + 5
        inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
        outputs = [m(i) for m, i in zip((model, other), inputs, strict=True)]
        weight = torch.randn(shape, dtype=torch.float64)
        for m, output in zip((model, other), outputs, strict=True):
            m.zero_grad()
            (output * weight).sum().backward()
        torch.testing.assert_close(outputs[1], outputs[0])
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(other.get_parameter(name).grad, parameter.grad, msg=f"{name}, step {step}")
        for name, buffer in model.named_buffers():
            torch.testing.assert_close(other.get_buffer(name), buffer, msg=f"{name}, step {step}")
    model.eval()
    other.eval()
    torch.testing.assert_close(other(x), model(x), rtol=1e-12, atol=1e-12)


def test_sync_batch_norm_keeps_the_parameter_objects() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3))
    before = dict(model.named_parameters())
    sync_batchnorm_(model)
    assert all(before[name] is parameter for name, parameter in model.named_parameters())
    assert sync_batchnorm_(model) == 0, "nothing is left to replace"


def test_a_weight_rounded_with_its_norm_follows_the_new_one() -> None:
    norm = nn.BatchNorm2d(3)
    model = nn.ModuleDict({"fold": FoldedWeight(norm=norm), "norm": norm})
    sync_batchnorm_(model)
    new = model["norm"]
    assert isinstance(new, SyncBatchNorm)
    assert new.running_var is not None
    new.running_var = torch.full((3,), 4.0)
    weight = torch.ones(3, 1, 1, 1)
    torch.testing.assert_close(model["fold"](weight), weight / (4 + norm.eps) ** 0.5)
