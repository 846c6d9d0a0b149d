"""Cost of a model: a hand-worked example, a known network, and what must not change it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from qtrain.costs.count import OUTSIDE_LAYERS, count
from qtrain.nn import QuantConv, QuantConvTranspose, QuantEmbedding, QuantLinear
from qtrain.quantizers.binary.abc_net import ABCNet
from qtrain.quantizers.binary.xnor import XNOR
from qtrain.quantizers.codebook.kmeans import KMeans
from qtrain.quantizers.uniform.affine import Affine
from qtrain.quantizers.uniform.lsq import LSQ
from qtrain.spec import PerChannel, PerTensor, QuantSpec


class Small(nn.Module):
    """Conv 3 -> 4 (3x3, padding 1) on 8x8, batch norm, mean pooling, linear 4 -> 5."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.bn(self.conv(x)).relu().mean((2, 3)))


def quantized(model: Small, *, weight_bits: int = 3, input_bits: int = 2, per_channel: bool = True) -> Small:
    """``model`` with its convolution quantized, the linear layer left in floating point."""
    layer = QuantConv(source=model.conv)
    spec = QuantSpec(bits=weight_bits, shape=tuple(layer.weight.shape), signed=True)
    layer.weight_quantizer = LSQ(spec=spec, granularity=PerChannel(0)) if per_channel else LSQ(spec=spec)
    layer.input_quantizer = LSQ(spec=QuantSpec(bits=input_bits))
    model.conv = layer
    return model


IMAGE = torch.zeros(2, 3, 8, 8)


def test_full_precision_by_hand() -> None:
    cost = count(Small(), IMAGE)
    # conv: 8*8 positions * 4 channels * (3*3*3) taps = 6912; fc: 4*5 = 20. One image, though two were given.
    assert [(layer.name, layer.kind, layer.macs) for layer in cost.layers] == [
        ("conv", "conv2d", 6912),
        ("fc", "linear", 20),
    ]
    assert cost.macs == 6932
    assert cost.bops == cost.fp_bops == 6932 * 32 * 32
    # conv 4*3*9 = 108; bn weight, bias, mean, variance 4*4 = 16 (num_batches_tracked is a counter); fc 20 + 5 = 25.
    assert cost.size_bytes == cost.fp_size_bytes == 4 * (108 + 16 + 25)
    assert cost.compression == 1.0
    assert cost.effective_bits == 32.0


def test_quantized_by_hand() -> None:
    cost = count(quantized(Small()), IMAGE)
    conv, fc = cost.layers
    # Weight: 108 codes of 3 bits and 4 scales of 32: 324 + 128 = 452 bits = 56.5 bytes, stored in 57. Input: one scale.
    assert (conv.weight_bits, conv.input_bits) == (3, 2)
    assert (conv.weight_storage_bits, conv.input_storage_bits) == (452, 32)
    assert conv.effective_bits == pytest.approx(452 / 108)
    assert conv.bops == 6912 * 3 * 2
    assert (fc.weight_bits, fc.input_bits, fc.bops) == (32, 32, 20 * 1024)
    assert cost.bops == 6912 * 6 + 20 * 1024
    assert cost.fp_bops == 6932 * 1024
    # 57 (codes and scales) + 4 (input scale) + 4 * 16 (bn) + 4 * 25 (fc) = 225, of 596 in full precision.
    assert (cost.size_bytes, cost.fp_size_bytes) == (225, 596)
    assert cost.compression == pytest.approx(596 / 225)
    # (452 + 20 * 32) bits for 108 + 20 weights.
    assert cost.effective_bits == pytest.approx(1092 / 128)


def test_one_scale_costs_less_than_one_a_channel() -> None:
    per_tensor = count(quantized(Small(), per_channel=False), IMAGE)
    assert per_tensor.layers[0].weight_storage_bits == 108 * 3 + 32


def test_zero_points_are_counted() -> None:
    model = quantized(Small())
    assert isinstance(model.conv, QuantConv)
    model.conv.weight_quantizer = Affine(spec=QuantSpec(bits=4, shape=(4, 3, 3, 3)), symmetric=False)
    model.conv.input_quantizer = Affine(spec=QuantSpec(bits=8), symmetric=False)
    conv = count(model, IMAGE).layers[0]
    assert conv.weight_storage_bits == 108 * 4 + 32 + 4
    assert conv.input_storage_bits == 32 + 8


def test_weight_only_quantization_leaves_the_input_at_32_bits() -> None:
    model = quantized(Small())
    assert isinstance(model.conv, QuantConv)
    model.conv.input_quantizer = None
    conv = count(model, IMAGE).layers[0]
    assert (conv.weight_bits, conv.input_bits, conv.input_storage_bits) == (3, 32, 0)
    assert conv.bops == 6912 * 3 * 32


def test_an_index_into_a_table_of_floats_multiplies_as_a_float() -> None:
    model = quantized(Small())
    assert isinstance(model.conv, QuantConv)
    quantizer = KMeans(spec=QuantSpec(bits=3, shape=(4, 3, 3, 3), signed=True))
    model.conv.weight_quantizer = quantizer
    conv = count(model, IMAGE).layers[0]
    assert (conv.weight_bits, conv.input_bits) == (32, 2)
    assert conv.weight_storage_bits == 108 * 3 + 8 * 32, "codes, and a codebook of eight"


def test_every_kind_of_layer_by_hand() -> None:
    model = nn.Sequential(
        nn.Embedding(5, 4), nn.Flatten(), nn.Unflatten(1, (4, 3)), nn.Conv1d(4, 2, 2), nn.ConvTranspose1d(2, 3, 2)
    )
    layers = [QuantEmbedding(source=model[0]), QuantConv(source=model[3]), QuantConvTranspose(source=model[4])]
    for place, layer in zip((0, 3, 4), layers, strict=True):
        shape = tuple(layer.effective_weight().shape)
        layer.weight_quantizer = LSQ(spec=QuantSpec(bits=2, shape=shape, signed=True), granularity=PerChannel(0))
        model[place] = layer
    cost = count(model, torch.zeros(1, 3, dtype=torch.long))
    # A look-up multiplies nothing; two outputs of 2 * 4 taps and 2 channels; two inputs of 2 channels into 3 * 2 taps.
    assert [(row.kind, row.macs) for row in cost.layers] == [("embedding", 0), ("conv1d", 32), ("conv_transpose1d", 24)]
    # Codes of 2 bits; scales for 5 rows, 2 and 3 output channels. Biases of 2 and 3 floats besides.
    assert [row.weight_storage_bits for row in cost.layers] == [40 + 5 * 32, 32 + 2 * 32, 24 + 3 * 32]
    assert cost.size_bytes == 25 + 12 + 15 + 4 * (2 + 3)


def test_quantizing_a_weight_does_not_count_as_macs() -> None:
    model = quantized(Small())
    assert isinstance(model.conv, QuantConv)
    model.conv.weight_quantizer = ABCNet(spec=QuantSpec(bits=3, shape=(4, 3, 3, 3), signed=True))
    cost = count(model, IMAGE)
    assert cost.macs == 6932, "the least squares of its bases are done once"
    assert cost.layers[0].bops == 6912 * 3 * 2
    assert model.conv.weight_quantizer.enabled


def test_the_map_of_input_magnitudes_is_a_cost_of_each_image() -> None:
    model = quantized(Small())
    assert isinstance(model.conv, QuantConv)
    model.conv.input_quantizer = XNOR(spec=QuantSpec(bits=1))
    assert count(model, IMAGE).macs > 6932


def test_resnet20_has_the_known_metrics() -> None:
    cifar_resnet = pytest.importorskip("qtrain.models.cifar_resnet")
    model = cifar_resnet.cifar_resnet20()
    cost = count(model, torch.zeros(1, 3, 32, 32))
    # He et al. 2016 give 0.27 M; convolutions and the head do 40.55 M multiply-accumulates.
    assert sum(p.numel() for p in model.parameters()) == 269_722
    # conv1 442368; stage 1 6 * 2359296; stages 2 and 3 each 1179648 + 5 * 2359296; head 640.
    assert cost.macs == 442_368 + 6 * 2_359_296 + 2 * (1_179_648 + 5 * 2_359_296) + 640 == 40_551_040
    # Parameters, and two statistics for each of the batch norms' 16*7 + 32*6 + 64*6 channels.
    assert cost.fp_size_bytes == 4 * (269_722 + 2 * (16 * 7 + 32 * 6 + 64 * 6))
    assert len(cost.layers) == 20


def test_the_model_is_left_as_it_was() -> None:
    model = quantized(Small()).train()
    model.bn.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    count(model, torch.randn(2, 3, 8, 8))
    assert model.training and model.conv.training and not model.bn.training
    assert not model.conv._forward_hooks
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_disabled_quantizer_still_counts() -> None:
    model = quantized(Small())
    expected = count(model, IMAGE)
    assert isinstance(model.conv, QuantConv) and model.conv.weight_quantizer is not None
    model.conv.weight_quantizer.enabled = False
    assert count(model, IMAGE) == expected


def test_depthwise_strided_and_transposed_convolutions() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=4, bias=False),
        nn.ConvTranspose2d(8, 6, 2, stride=2, bias=False),
        nn.Conv2d(6, 2, 1),
    )
    cost = count(model, torch.zeros(1, 4, 8, 8))
    # 4*4 positions * 8 channels * 9 taps (one input channel a group); 8 * 4*4 inputs * 6*2*2; 8*8 * 2 * 6.
    assert [layer.macs for layer in cost.layers] == [16 * 8 * 9, 8 * 16 * 24, 64 * 12]
    assert [layer.kind for layer in cost.layers] == ["conv2d", "conv_transpose2d", "conv2d"]


class Attention(nn.Module):
    """One head over 6 tokens of 4 channels; ``project`` is used twice, ``idle`` never."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Linear(4, 3)
        self.project = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.project(x), self.project(x)
        return (q @ k.transpose(1, 2)).softmax(-1) @ x


def test_products_outside_layers_have_a_row_at_full_precision() -> None:
    cost = count(Attention(), torch.zeros(3, 6, 4))
    assert [layer.name for layer in cost.layers] == ["project", "idle", OUTSIDE_LAYERS]
    project, idle, outside = cost.layers
    assert project.macs == 2 * 6 * 4 * 4
    assert idle.macs == 0
    # q k^T and the product with x: 6 * 6 * 4 each.
    assert outside.macs == 2 * 6 * 6 * 4
    assert outside.bops == outside.macs * 1024
    assert outside.effective_bits == 0.0


class FusedAttention(nn.Module):
    """The two products of attention in one operator: (N, heads, tokens, channels)."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x)


def test_fused_attention_counts_like_its_two_products() -> None:
    (outside,) = count(FusedAttention(), torch.zeros(2, 3, 16, 8)).layers
    assert outside.macs == 2 * 3 * 16 * 16 * 8


def test_a_shared_parameter_is_stored_once() -> None:
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    model[1].weight = model[0].weight
    cost = count(model, torch.zeros(1, 6))
    assert cost.size_bytes == 36 * 4
    assert [(row.weights, row.weight_storage_bits, row.macs) for row in cost.layers] == [(36, 36 * 32, 36), (0, 0, 36)]


def test_a_shared_weight_counts_once_for_the_bits_of_a_weight() -> None:
    """16 weights of 4 bits that two layers have, and 4 of 32 bits."""
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(2)), nn.Linear(4, 1, bias=False))
    model[1].weight = model[0].weight
    quantizer = LSQ(spec=QuantSpec(bits=4, shape=(4, 4), signed=True), granularity=PerTensor())
    for place in range(2):
        model[place] = QuantLinear(source=model[place])
        model[place].weight_quantizer = quantizer
    assert count(model, torch.zeros(1, 4)).effective_bits == (16 * 4 + 32 + 4 * 32) / 20


def test_a_parameter_that_a_full_precision_layer_shares_stays_stored() -> None:
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    model[1].weight = model[0].weight
    layer = QuantLinear(source=model[0])
    layer.weight_quantizer = LSQ(spec=QuantSpec(bits=4, shape=(6, 6), signed=True))
    model[0] = layer
    # Codes of 4 bits and a scale for the first, 32 bits an element for the second; without conversion one copy.
    cost = count(model, torch.zeros(1, 6))
    assert (cost.size_bytes, cost.fp_size_bytes) == (18 + 4 + 144, 144)


class Gain(nn.Module):
    """A weight standardization with a learned gain a channel, which the stored codes absorb."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4, 1, 1, 1))

    def forward(self, weight: Tensor) -> Tensor:
        return self.gain * weight


def test_weight_transform_is_not_stored_beside_the_codes() -> None:
    layer = QuantConv(source=nn.Conv2d(3, 4, 3, bias=False), weight_transform=Gain())
    layer.weight_quantizer = LSQ(spec=QuantSpec(bits=4, shape=(4, 3, 3, 3), signed=True))
    cost = count(layer, torch.zeros(1, 3, 8, 8))
    assert cost.size_bytes == 108 // 2 + 4
    assert cost.fp_size_bytes == (108 + 4) * 4


def test_a_plain_dict_carries_the_summary_fields() -> None:
    cost = count(quantized(Small()), IMAGE)
    plain = cost.as_dict()
    assert plain["size_bytes"] == cost.size_bytes and plain["bops"] == cost.bops
    assert math.isclose(plain["compression"], cost.compression)
    assert plain["layers"][0]["shape"] == [4, 3, 3, 3]
    assert plain["layers"][0]["effective_bits"] == pytest.approx(452 / 108)


def test_a_weight_that_is_not_finite_is_refused() -> None:
    model = quantized(Small())
    with torch.no_grad():
        model.conv.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        count(model, IMAGE)
