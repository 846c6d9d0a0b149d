"""The two values about each weight, whatever the quantizer, and that a choice among them outlives nearest rounding."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qtrain.convert.layers import quant_layers
from qtrain.nn import QuantConv, QuantConvTranspose, QuantEmbedding, QuantLinear, QuantWeighted
from qtrain.observers.min_max import MinMax
from qtrain.ptq.rounding.base import CannotRound, all_candidates, candidates, write_
from qtrain.quantizers.codebook.kmeans import KMeans
from qtrain.quantizers.uniform.affine import Affine
from qtrain.quantizers.uniform.lsq import LSQ
from qtrain.quantizers.uniform.lsq_plus import LSQPlus
from qtrain.quantizers.uniform.stochastic_rounding import StochasticRounding
from qtrain.quantizers.wrappers.blend import Blend
from qtrain.quantizers.wrappers.outlier import Outlier
from qtrain.spec import PerBlock, PerChannel, QuantSpec
from qtrain.storage.affine import AffineTensor

EVEN: dict[str, Any] = {
    "lsq": LSQ,
    "lsq_plus": partial(LSQPlus, granularity=PerChannel(0)),
    "affine": partial(Affine, granularity=PerBlock(2)),
    "narrow": partial(Affine, narrow=True),
    "zero_point": partial(Affine, symmetric=False, granularity=PerChannel(0)),
    "stochastic": StochasticRounding,
    "wrapped": partial(Blend, quantizer=LSQ, share=0.5),
}


def with_quantizer(layer: QuantWeighted, quantizer: Any, bits: int = 3) -> QuantWeighted:
    """``layer`` with a calibrated weight quantizer."""
    weight = layer.effective_weight().detach()
    made = quantizer(spec=QuantSpec(bits=bits, shape=tuple(weight.shape), signed=True))
    observer = MinMax(granularity=made.granularity)
    observer.update(weight)
    made.calibrate_(observer.observed(bits)._replace(tensor=weight))
    layer.weight_quantizer = made
    return layer


def convolution(quantizer: Any, bits: int = 3) -> QuantWeighted:
    torch.manual_seed(0)
    return with_quantizer(QuantConv(source=nn.Conv2d(4, 6, 3)), quantizer, bits)


def stored(layer: QuantWeighted) -> AffineTensor:
    """What the layer's weight is stored as: by nearest rounding."""
    assert layer.weight_quantizer is not None
    tensor = layer.weight_quantizer.eval().quantize(layer.effective_weight().detach())
    assert isinstance(tensor, AffineTensor)
    return tensor


@pytest.mark.parametrize("quantizer", EVEN.values(), ids=EVEN.keys())
def test_candidates_are_neighboring_values_on_either_side(quantizer: Any) -> None:
    layer = convolution(quantizer)
    found = candidates(layer)
    weight, tensor = layer.effective_weight().detach(), stored(layer)
    low, high = (tensor_with(tensor, code) for code in (tensor.low, tensor.high))
    step = tensor.granularity.expand(tensor.scale, tuple(weight.shape)).expand(weight.shape)
    hair = 1e-4 * step  # the outermost weight may be the outermost value, where a choice is a matter of its last bit
    inside, outside = (weight > low + hair) & (weight < high - hair), (weight < low - hair) | (weight > high + hair)
    assert inside.sum() > 100
    assert found.free[inside].all()
    assert not found.free[outside].any()
    torch.testing.assert_close((found.up - found.down)[inside], step[inside])
    assert ((found.down <= weight) & (weight <= found.up))[inside].all()
    assert torch.equal(found.nearest, tensor.dequantize())
    assert torch.equal(found.down[outside], found.nearest[outside])


def tensor_with(tensor: AffineTensor, code: int) -> Tensor:
    """The values of a tensor all of whose codes are ``code``."""
    return replace(tensor, codes=torch.full_like(tensor.codes, code)).dequantize()


@pytest.mark.parametrize("quantizer", EVEN.values(), ids=EVEN.keys())
@pytest.mark.parametrize("kind", ["conv", "transposed", "linear"])
def test_nearest_rounding_of_what_is_written_gives_the_chosen_codes(quantizer: Any, kind: str) -> None:
    torch.manual_seed(1)
    if kind == "conv":
        layer: QuantWeighted = QuantConv(source=nn.Conv2d(4, 6, 3))
    elif kind == "transposed":
        layer = QuantConvTranspose(source=nn.ConvTranspose2d(8, 4, 3, groups=2))
    else:
        layer = QuantLinear(source=nn.Linear(20, 10))
    found = candidates(with_quantizer(layer, quantizer))
    down, up = (codes_of(layer, values) for values in (found.down, found.up))
    choose = torch.rand(down.shape) < 0.5
    write_(found, torch.where(choose, found.up, found.down))
    after = stored(layer)
    assert torch.equal(after.codes, torch.where(choose, up, down))
    assert torch.equal(after.dequantize(), layer.effective_weight()), "values on the grid"
    assert not torch.equal(after.codes, codes_of(layer, found.nearest))


def codes_of(layer: QuantWeighted, values: Tensor) -> Tensor:
    assert layer.weight_quantizer is not None
    return layer.weight_quantizer.eval().quantize(values).codes


def test_candidates_leave_the_layer_and_its_modes_unchanged() -> None:
    layer = convolution(StochasticRounding)
    layer.train()
    before = copy.deepcopy(layer.state_dict())
    candidates(layer)
    assert layer.weight_quantizer is not None
    assert layer.weight_quantizer.training
    assert all(torch.equal(tensor, before[key]) for key, tensor in layer.state_dict().items())


class Standardized(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight - weight.mean()


def test_layers_that_cannot_be_rounded_give_the_reason() -> None:
    with pytest.raises(CannotRound, match="KMeans has no even steps; lsq"):
        candidates(convolution(KMeans))
    with pytest.raises(CannotRound, match="Outlier changes values that are whole steps"):
        candidates(convolution(partial(Outlier, quantizer=LSQ, fraction=0.1)))
    with pytest.raises(CannotRound, match="looked up and not multiplied"):
        candidates(with_quantizer(QuantEmbedding(source=nn.Embedding(5, 4)), LSQ))
    standardized = QuantConv(source=nn.Conv2d(4, 6, 3), weight_transform=Standardized())
    with pytest.raises(CannotRound, match="standardized"):
        candidates(with_quantizer(standardized, LSQ))


def test_all_candidates_logs_other_layers_and_refuses_an_uncalibrated_model(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(convolution(LSQ), convolution(KMeans), nn.ReLU())
    with caplog.at_level(logging.WARNING):
        assert list(all_candidates(model)) == ["0"]
    assert [record.message for record in caplog.records] == [
        "left at nearest rounding: 1: KMeans has no even steps; lsq, lsq_plus and affine have"
    ]
    layer = quant_layers(model)["0"]
    assert layer.weight_quantizer is not None
    layer.weight_quantizer.initialized.fill_(False)
    with pytest.raises(ValueError, match="layer '0' is not calibrated"):
        all_candidates(model)


def test_rounding_writes_weights_also_where_python_leaves_out_assertions() -> None:
    program = (
        "import torch; from torch import nn; import qtrain; model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)); "
        "images = torch.randn(8, 3, 2, 2); "
        "student = qtrain.quantize(model, images, weight_bits=3, input_bits=8, ends=None, rounding='squant'); "
        "print(float((student[1].weight - model[1].weight).abs().max()))"
    )
    done = subprocess.run([sys.executable, "-O", "-c", program], capture_output=True, text=True, check=True)
    assert float(done.stdout) > 0
