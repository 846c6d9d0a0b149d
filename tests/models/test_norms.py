"""The form of a batch norm computes what the module computes in eval mode."""

from __future__ import annotations

import pytest
import torch
from timm.layers.norm_act import BatchNormAct2d, FrozenBatchNormAct2d
from torch import Tensor, nn

from qtrain.models.norms import NormForm, describe_norm


def filled(norm: nn.Module) -> nn.Module:
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean"):
            if getattr(norm, name, None) is not None:
                getattr(norm, name).normal_(generator=draw)
        norm.running_var.uniform_(0.1, 3, generator=draw)  # type: ignore[union-attr, operator]
    return norm.eval()


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(5),
        nn.BatchNorm2d(5, affine=False, eps=0.1),
        nn.SyncBatchNorm(5),
        BatchNormAct2d(5, act_layer=nn.SiLU, inplace=False),
        BatchNormAct2d(5, apply_act=False),
        BatchNormAct2d(5, drop_layer=nn.Dropout, inplace=False),
        FrozenBatchNormAct2d(5, act_layer=nn.ReLU, inplace=False),
    ],
    ids=["plain", "not affine", "sync", "silu", "no activation", "dropout", "frozen"],
)
def test_norm_form_computes_the_module(norm: nn.Module) -> None:
    form = describe_norm(filled(norm))
    assert isinstance(form, NormForm) and form.trained
    x = torch.randn(4, 5, 3, 3)
    y = form.scale.reshape(1, 5, 1, 1) * x + form.shift.reshape(1, 5, 1, 1)
    torch.testing.assert_close(form.rest(y), norm(x), atol=1e-5, rtol=1e-5)


def test_moments_are_those_over_the_training_data() -> None:
    norm = nn.BatchNorm2d(3, momentum=None, eps=0.5)  # an eps that shows in the standard deviation
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(64, 3, 8, 8) * torch.tensor([0.5, 1.0, 3.0]).reshape(1, 3, 1, 1) + 2
    with torch.no_grad():
        norm(x)
        y = norm.eval()(x).transpose(0, 1).flatten(1)
    form = describe_norm(norm)
    assert isinstance(form, NormForm)
    torch.testing.assert_close(form.mean, y.mean(dim=1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(form.std, y.std(dim=1), atol=1e-5, rtol=1e-4)


def test_norms_without_form_give_a_reason() -> None:
    class Own(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return input

    assert describe_norm(nn.LayerNorm(3)) is None
    assert describe_norm(Own(3)) == "a Own has a forward of its own"
    assert "no running statistics" in str(describe_norm(nn.BatchNorm2d(3, track_running_stats=False)))
    fresh = describe_norm(nn.BatchNorm2d(3))
    assert isinstance(fresh, NormForm) and not fresh.trained
