"""Quantized layers: the original bit for bit without quantizers, and with them what their formula says."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtrain.models.layer_kinds import LayerSpec, describe_layer
from qtrain.nn import QuantConv, QuantConvTranspose, QuantEmbedding, QuantLinear
from qtrain.nn.conv_transpose import outputs_first
from qtrain.observers.min_max import MinMax
from qtrain.quantizers.base import Quantizer
from qtrain.quantizers.binary.xnor import XNOR
from qtrain.quantizers.uniform.affine import Affine
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
    layer = QuantConv(source=source)
    x = torch.randn(2, 4, 9, 9)
    assert torch.equal(layer(x), source(x))
    assert layer.weight is source.weight
    assert layer.bias is source.bias
    assert layer.state_dict().keys() == source.state_dict().keys()
    assert repr(source)[len("Conv2d") :] == repr(layer)[len("QuantConv") :]


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_module_is_applied_once(mode: str) -> None:
    source = nn.Conv2d(4, 6, (3, 5), padding=(1, 2), padding_mode=mode)
    form = describe_layer(source)
    assert isinstance(form, LayerSpec) and form.pad is not None
    layer, x = QuantConv(source=source, pad=form.pad), torch.randn(2, 4, 9, 9)
    assert torch.equal(layer(x), source(x))


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_without_quantizers_is_its_source(bias: bool) -> None:
    torch.manual_seed(0)
    source = nn.Linear(5, 3, bias=bias)
    layer = QuantLinear(source=source)
    x = torch.randn(2, 7, 5)
    assert torch.equal(layer(x), source(x))
    assert layer.weight is source.weight
    assert layer.state_dict().keys() == source.state_dict().keys()


OTHERS: dict[str, tuple[Any, nn.Module, tuple[int, ...]]] = {
    "one axis": (QuantConv, nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 9)),
    "three axes": (QuantConv, nn.Conv3d(4, 6, (1, 3, 2), padding=(0, 1, 1), bias=False), (2, 4, 5, 6, 7)),
    "transposed, one axis": (QuantConvTranspose, nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), (2, 4, 9)),
    "transposed, groups": (QuantConvTranspose, nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (2, 4, 5, 6)),
    "transposed, three axes": (
        QuantConvTranspose,
        nn.ConvTranspose3d(4, 6, 2, dilation=2, bias=False),
        (2, 4, 5, 6, 7),
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_convolutions_without_quantizers_are_their_source(name: str) -> None:
    kind, source, shape = OTHERS[name]
    layer = kind(source=source)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer(x), source(x))
    assert layer.weight is source.weight and layer.state_dict().keys() == source.state_dict().keys()


@pytest.mark.parametrize("name", OTHERS)
def test_other_convolutions_use_quantized_weight_and_input(name: str) -> None:
    """The source itself, with the decoded codes as its weight and input, is the independent computation."""
    kind, source, shape = OTHERS[name]
    layer = kind(source=copy.deepcopy(source))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight = layer.effective_weight().detach()
    assert weight.shape[0] == 6, "output channels come first"
    layer.weight_quantizer = calibrated(
        QuantSpec(bits=3, shape=tuple(weight.shape), signed=True), weight, PerChannel(0)
    )
    layer.input_quantizer = calibrated(QuantSpec(bits=4), x)
    decoded = layer.weight_quantizer.quantize(weight).dequantize()
    expected = copy.deepcopy(source)
    with torch.no_grad():
        expected.weight.copy_(outputs_first(decoded, source.groups) if source.transposed else decoded)
    torch.testing.assert_close(layer(x), expected(layer.input_quantizer.quantize(x).dequantize()))
    assert not torch.allclose(layer(x), source(x))


def test_a_transposed_convolution_takes_an_output_size() -> None:
    source = nn.ConvTranspose2d(2, 3, 3, stride=2)
    x = torch.randn(1, 2, 4, 4)
    assert torch.equal(QuantConvTranspose(source=source)(x, output_size=[10, 10]), source(x, output_size=[10, 10]))


def test_rows_of_a_quantized_table() -> None:
    source = nn.Embedding(5, 4, padding_idx=0)
    layer = QuantEmbedding(source=source)
    index = torch.tensor([[0, 3], [4, 1]])
    assert torch.equal(layer(index), source(index))
    layer.weight_quantizer = calibrated(
        QuantSpec(bits=2, shape=(5, 4), signed=True), source.weight.detach(), PerChannel(0)
    )
    assert torch.equal(layer(index), layer.weight_quantizer.quantize(source.weight).dequantize()[index])
    layer(index).sum().backward()
    assert source.weight.grad is not None
    assert not source.weight.grad[0].any() and source.weight.grad[3].any(), "padding learns nothing"


class Doubling(nn.Module):
    """A gradient quantizer that anyone can recognize."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x - x.detach()


def test_gradient_quantizer_changes_only_the_backward_pass() -> None:
    torch.manual_seed(0)
    source, x = nn.Linear(4, 3), torch.randn(2, 4, requires_grad=True)
    layer = QuantLinear(source=source)
    plain = torch.autograd.grad(layer(x).square().sum(), [x, source.weight])
    layer.gradient_quantizer = Doubling()
    assert torch.equal(layer(x), source(x))
    doubled = torch.autograd.grad(layer(x).square().sum(), [x, source.weight])
    for once, twice in zip(plain, doubled, strict=True):
        torch.testing.assert_close(twice, 2 * once)


@pytest.mark.parametrize("bias", [True, False])
def test_xnor_multiplies_the_product_by_its_map_before_the_bias(bias: bool) -> None:
    torch.manual_seed(0)
    source, x = nn.Conv2d(3, 4, 3, padding=1, stride=2, bias=bias), torch.randn(2, 3, 8, 8)
    layer = QuantConv(source=source)
    quantizer = XNOR(spec=QuantSpec(bits=1, signed=True))
    layer.input_quantizer = quantizer
    signs = torch.where(x >= 0, 1.0, -1.0)
    product = F.conv2d(signs, source.weight, None, stride=2, padding=1)
    expected = product * quantizer.output_factor(x, layer)
    if bias:
        expected = expected + source.bias.reshape(1, -1, 1, 1)
    torch.testing.assert_close(layer(x), expected)
    quantizer.enabled = False
    assert torch.equal(layer(x), source(x))


def test_both_quantizers_are_applied() -> None:
    torch.manual_seed(0)
    source, x = nn.Conv2d(4, 6, 3, padding=1), torch.randn(2, 4, 8, 8)
    layer = QuantConv(source=source)
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
    layer = QuantConv(source=source, pad=Ring(), weight_transform=Double())
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
