"""Quantised layers: the original bit for bit without quantizers, and with them what their formula says."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtrain.nn import QuantConv2d, QuantLinear
from qtrain.observers.min_max import MinMax
from qtrain.quantizers.affine import Affine
from qtrain.quantizers.base import Quantizer
from qtrain.spec import Granularity, PerChannel, PerTensor, QuantSpec


def calibrated(spec: QuantSpec, x: Tensor, granularity: Granularity = PerTensor()) -> Quantizer:  # noqa: B008 - frozen
    quantizer = Affine(spec=spec, granularity=granularity)
    observer = MinMax(granularity=granularity)
    observer.update(x)
    quantizer.calibrate_(observer.observed(spec.bits))
    return quantizer


CONVOLUTIONS = [
    {},
    {"stride": 2, "padding": 1},
    {"groups": 2, "bias": False},
    {"dilation": 2, "padding": 2},
    {"padding": "same"},
    {"padding": (1, 0)},
    {"padding": 1, "padding_mode": "reflect"},
]


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_a_convolution_without_quantizers_is_its_source(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    source = nn.Conv2d(4, 6, 3, **options)  # type: ignore[arg-type]
    layer = QuantConv2d(source=source)
    x = torch.randn(2, 4, 9, 9)
    assert torch.equal(layer(x), source(x))
    assert layer.weight is source.weight
    assert layer.bias is source.bias
    assert layer.state_dict().keys() == source.state_dict().keys()
    assert repr(source)[len("Conv2d") :] == repr(layer)[len("QuantConv2d") :]


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_without_quantizers_is_its_source(bias: bool) -> None:
    torch.manual_seed(0)
    source = nn.Linear(5, 3, bias=bias)
    layer = QuantLinear(source=source)
    x = torch.randn(2, 7, 5)
    assert torch.equal(layer(x), source(x))
    assert layer.weight is source.weight
    assert layer.state_dict().keys() == source.state_dict().keys()


def test_both_quantizers_are_applied() -> None:
    torch.manual_seed(0)
    source, x = nn.Conv2d(4, 6, 3, padding=1), torch.randn(2, 4, 8, 8)
    layer = QuantConv2d(source=source)
    layer.weight_quantizer = calibrated(
        QuantSpec(bits=4, shape=(6, 4, 3, 3), signed=True), source.weight, PerChannel(0)
    )
    layer.input_quantizer = calibrated(QuantSpec(bits=4), x)
    expected = F.conv2d(
        layer.input_quantizer.quantize(x).dequantize(),
        layer.weight_quantizer.quantize(source.weight).dequantize(),
        source.bias,
        padding=1,
    )
    assert torch.equal(layer(x), expected)
    assert not torch.equal(layer(x), source(x))


def test_padding_comes_after_the_input_quantizer_and_the_transform_before_the_weights() -> None:
    class Ring(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.pad(x, (1, 1, 1, 1))

    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    torch.manual_seed(0)
    source, x = nn.Conv2d(2, 3, 3, padding=1, bias=False), torch.rand(1, 2, 5, 5) + 1
    layer = QuantConv2d(source=source, pad=Ring(), weight_transform=Double())
    assert torch.equal(layer.effective_weight(), 2 * source.weight)
    torch.testing.assert_close(layer(x), 2 * source(x))
    layer.weight_quantizer = calibrated(
        QuantSpec(bits=8, shape=(3, 2, 3, 3), signed=True), layer.effective_weight().detach()
    )
    layer.input_quantizer = calibrated(QuantSpec(bits=8), x)
    expected = F.conv2d(F.pad(layer.input_quantizer(x), (1, 1, 1, 1)), layer.weight_quantizer(layer.effective_weight()))
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_reach_weight_and_input(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    source = nn.Linear(6, 4).to(dtype)
    layer = QuantLinear(source=source)
    x = torch.randn(3, 6, dtype=dtype, requires_grad=True)
    layer.weight_quantizer = calibrated(QuantSpec(bits=4, shape=(4, 6), signed=True), source.weight)
    layer.input_quantizer = calibrated(QuantSpec(bits=4), x)
    y = layer(x)
    assert y.dtype == dtype
    y.float().square().sum().backward()
    for tensor in (x, source.weight, source.bias):
        assert tensor.grad is not None
        assert tensor.grad.abs().sum() > 0
