"""A change of bits moves the quantized values no more than it must."""

from __future__ import annotations

import copy
import logging
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qtrain.convert.layers import quant_layers
from qtrain.convert.switch import calibrate_at_, fitted_factor, switch_bits_
from qtrain.nn import QuantConv, QuantLinear
from qtrain.observers.min_max import MinMax
from qtrain.observers.squared_error import SquaredError
from qtrain.quantizers.base import MakeQuantizer, Quantizer
from qtrain.quantizers.codebook.apot import APoT
from qtrain.quantizers.codebook.kmeans import KMeans
from qtrain.quantizers.codebook.power_of_two import PowerOfTwo
from qtrain.quantizers.hooks import Rescalable
from qtrain.quantizers.uniform.affine import Affine
from qtrain.quantizers.uniform.dorefa import DoReFa
from qtrain.quantizers.uniform.duq import DuQ
from qtrain.quantizers.uniform.lsq import LSQ
from qtrain.quantizers.uniform.lsq_plus import LSQPlus
from qtrain.quantizers.uniform.pact import PACT
from qtrain.quantizers.uniform.stochastic_rounding import StochasticRounding
from qtrain.quantizers.wrappers.blend import Blend
from qtrain.quantizers.wrappers.outlier import Outlier
from qtrain.spec import FULL_PRECISION, LayerBits, PerBlock, PerChannel, PerTensor, QuantSpec

EVEN: dict[str, Any] = {
    "lsq": LSQ,
    "lsq_plus": LSQPlus,
    "affine": Affine,
    "narrow": partial(Affine, narrow=True),
    "zero_point": partial(Affine, symmetric=False),
    "stochastic": StochasticRounding,
    "duq": DuQ,
    "wrapped": partial(Blend, quantizer=LSQ, share=0.5),
}
LEVELS: dict[str, Any] = {
    "apot": partial(APoT, normalize=False),
    "apot_normalized": partial(APoT, normalize=True),
    "power_of_two": PowerOfTwo,
    "inq": partial(PowerOfTwo, scale="power_of_two"),
}
INPUTS: dict[str, Any] = {"lsq": LSQ, "lsq_plus": LSQPlus, "affine": Affine, "pact": PACT, "duq": DuQ, "apot": APoT}
RANGED = {**EVEN, **LEVELS}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def calibrated(make: MakeQuantizer, x: Tensor, bits: int, *, weight: bool = True) -> Any:
    spec = QuantSpec(bits=bits, shape=tuple(x.shape), signed=True) if weight else QuantSpec(bits=bits)
    quantizer = make(spec=spec)
    recalibrate(quantizer, x, MinMax)
    return quantizer.eval()


def recalibrate(quantizer: Quantizer, x: Tensor, kind: Any = SquaredError) -> None:
    observer = kind(granularity=quantizer.granularity)
    observer.update(x)
    tensor = x if quantizer.spec.is_weight else None
    quantizer.calibrate_(observer.observed(int(quantizer.bits))._replace(tensor=tensor))


def innermost_factors(quantizer: Quantizer, factor: Tensor) -> dict[nn.Parameter, Tensor]:
    core: Any = quantizer.inner if isinstance(quantizer, Blend | Outlier) else quantizer
    assert isinstance(core, Rescalable)
    return core.rescale_(factor)


def switched(quantizer: Quantizer, x: Tensor, bits: int) -> Any:
    other = copy.deepcopy(quantizer)
    factor = fitted_factor(quantizer, x, bits)
    assert factor is not None
    other.set_range_(bits=bits, signed=bool(other.signed))
    innermost_factors(other, factor)
    return other


def distance(quantizer: Quantizer, x: Tensor, before: Tensor) -> Tensor:
    """The squared error of each group, float64."""
    return quantizer.granularity.flatten((quantizer(x).double() - before.double()).square()).sum(dim=1)


GRANULARITIES = [PerTensor(), PerChannel(0), PerBlock(2)]
SHAPES = st.sampled_from([(4, 6), (3, 2, 3, 3), (8, 4, 1, 1), (2, 2, 5)])


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(set(EVEN) - {"duq"})),
    granularity=st.sampled_from(GRANULARITIES),
    shape=SHAPES,
    bits=st.integers(2, 7),
    more=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_switch_to_more_bits_keeps_values_and_only_refines_rounding(
    name: str, granularity: Any, shape: Any, bits: int, more: int, seed: int
) -> None:
    """Every old value is a new one, so nothing moves by more than half of an old step, or a step where it was cut."""
    x = noise(*shape, seed=seed)
    make = EVEN[name]
    place = {"quantizer": partial(LSQ, granularity=granularity)} if name == "wrapped" else {"granularity": granularity}
    quantizer = calibrated(partial(make, **place), x, bits)
    finer = switched(quantizer, x, bits + more)
    old = quantizer(x)
    torch.testing.assert_close(finer(old), old, rtol=1e-5, atol=1e-6)
    step, fine = (getattr(each, "inner", each).quantize(x).scale for each in (quantizer, finer))
    torch.testing.assert_close(fine, step / 2**more)  # all new bits go into finer steps, none into more range
    step = granularity.expand(step, tuple(x.shape))
    moved = (finer(x) - old).abs()
    inside = (x - old).abs() <= step / 2
    assert (moved[inside] <= step.expand_as(x)[inside] * (0.5 + 1e-5)).all()
    assert (moved <= step * (1 + 1e-5)).all()


@pytest.mark.parametrize("name", ["lsq", "lsq_plus", "affine", "pact"])
@pytest.mark.parametrize("signed", [False, True])
def test_switch_to_more_bits_for_inputs_follows_the_plain_rule(name: str, signed: bool) -> None:
    x = noise(4, 3, 5, 5) if signed else noise(4, 3, 5, 5).relu()
    quantizer = calibrated(INPUTS[name], x, 3, weight=False)
    finer = switched(quantizer, x, 6)
    torch.testing.assert_close(finer(quantizer(x)), quantizer(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(finer.quantize(x).scale, quantizer.quantize(x).scale / 8)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(RANGED)),
    granularity=st.sampled_from(GRANULARITIES),
    shape=SHAPES,
    bits=st.integers(3, 7),
    fewer=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_switch_to_fewer_bits_has_less_error_than_plain_rule_and_new_calibration(
    name: str, granularity: Any, shape: Any, bits: int, fewer: int, seed: int
) -> None:
    x = noise(*shape, seed=seed)
    bits = min(bits, 7)
    final = max(bits - fewer, 2)
    place = {"quantizer": partial(LSQ, granularity=granularity)} if name == "wrapped" else {"granularity": granularity}
    quantizer = calibrated(partial(RANGED[name], **place), x, bits)
    before = quantizer(x)
    fitted = distance(switched(quantizer, x, final), x, before)
    plain, anew = copy.deepcopy(quantizer), copy.deepcopy(quantizer)
    for each in (plain, anew):
        each.set_range_(bits=final, signed=True if name != "zero_point" else bool(each.signed))
    if name in EVEN and name != "duq":  # the others keep their clip, which is all that they have
        innermost_factors(plain, torch.full(quantizer.state_shape, 2.0 ** (bits - final)))
    recalibrate(anew, x)
    assert (fitted <= distance(plain, x, before) * (1 + 1e-5) + 1e-9).all()
    if name != "zero_point":  # a new calibration has another zero point too
        assert (fitted <= distance(anew, x, before) * (1 + 1e-5) + 1e-9).all()


@pytest.mark.parametrize(("bits", "final"), [(8, 4), (8, 2), (4, 3), (4, 2), (3, 2)])
@pytest.mark.parametrize("kind", ["weight", "input"])
def test_search_for_fewer_bits_finds_the_least_error(bits: int, final: int, kind: str) -> None:
    """Against every scale of a dense grid, with the formula written out in float64."""
    weight = kind == "weight"
    x = noise(40, 25) if weight else noise(40, 25).relu()
    quantizer = calibrated(LSQ, x, bits, weight=weight)
    low, high = (-(2 ** (final - 1)), 2 ** (final - 1) - 1) if weight else (0, 2**final - 1)
    before, wide = quantizer(x).detach().double(), x.double()
    least = min(
        float(((wide / s).clamp(low, high).round() * s - before).square().sum())
        for s in torch.logspace(-2, 1, 3000, dtype=torch.float64)
    )
    found = float(distance(switched(quantizer, x, final), x, before).detach())
    assert found <= 1.01 * least


def test_values_representable_with_fewer_bits_do_not_move() -> None:
    """Steps of a half, even codes from -8 to 6: at three bits the same, with steps of one."""
    x = torch.tensor([-4.0, -3.0, -1.0, 0.0, 2.0, 3.0])
    quantizer = LSQ(spec=QuantSpec(bits=4, shape=(6,), signed=True)).eval()
    with torch.no_grad():
        quantizer.scale.fill_(0.5)
    coarse = switched(quantizer, x, 3)
    assert torch.equal(coarse(x), x)
    assert float(coarse.scale) == 1.0


@pytest.mark.parametrize("name", [*sorted(set(RANGED) - {"zero_point", "apot_normalized"}), "pact"])
def test_rescaling_scales_every_value(name: str) -> None:
    x = noise(4, 6)
    make, weight = (PACT, False) if name == "pact" else (RANGED[name], True)
    quantizer = calibrated(make, x, 4, weight=weight)
    wider = copy.deepcopy(quantizer)
    innermost_factors(wider, torch.full(quantizer.state_shape, 2.0))
    torch.testing.assert_close(wider(2 * x), 2 * quantizer(x), rtol=1e-5, atol=0)


def test_a_rescaled_zero_point_keeps_the_lowest_value() -> None:
    """Codes 0..15, step 0.5, zero point 4: the lowest value is -2, and stays it with steps of 1."""
    quantizer: Any = Affine(spec=QuantSpec(bits=4), symmetric=False).eval()
    quantizer.scale.fill_(0.5)
    quantizer.zero_point.fill_(4)
    innermost_factors(quantizer, torch.tensor(2.0))
    assert torch.equal(quantizer(torch.tensor([-9.0, 99.0])), torch.tensor([-2.0, 13.0]))


def test_powers_of_two_stay_powers_of_two() -> None:
    quantizer = PowerOfTwo(spec=QuantSpec(bits=4, shape=(3,), signed=True), scale="power_of_two")
    innermost_factors(quantizer, torch.tensor(2.7))
    assert float(quantizer.scale) == 2.0


@pytest.mark.parametrize("name", ["lsq", "lsq_plus", "apot", "power_of_two", "duq", "pact"])
def test_switch_returns_the_factor_of_each_gradient(name: str) -> None:
    """A loss that is the same function of the codes: by the chain rule its gradient is that of before, divided."""
    x = noise(4, 6) * 100  # beyond the range, where only the range is learned
    make, weight = (PACT, False) if name == "pact" else (RANGED[name], True)
    quantizer = calibrated(make, noise(4, 6), 4, weight=weight)
    wider = copy.deepcopy(quantizer)
    factor = torch.full(quantizer.state_shape, 1.7)
    for (parameter, multiplied), old in zip(
        innermost_factors(wider, factor).items(), quantizer.parameters(), strict=False
    ):
        loss, scaled = quantizer(x).square().sum(), (wider(1.7 * x) / 1.7).square().sum()
        (before,), (after,) = torch.autograd.grad(loss, old), torch.autograd.grad(scaled, parameter)
        torch.testing.assert_close(after, before * multiplied, rtol=1e-4, atol=1e-4)


def student(weight: Any = LSQ, input: Any = LSQ, bits: int = 8) -> tuple[Any, Tensor]:
    """A convolution ("0") and a linear layer ("3"), calibrated for ``bits``, and the images that they saw."""
    torch.manual_seed(0)
    model = nn.Sequential(
        QuantConv(source=nn.Conv2d(1, 4, 3)), nn.ReLU(), nn.Flatten(), QuantLinear(source=nn.Linear(64, 3))
    )
    images = noise(8, 1, 6, 6)
    x = images
    for module in model:
        if isinstance(module, QuantConv | QuantLinear):
            w = module.weight.detach()
            module.weight_quantizer = calibrated(weight, w, bits)
            module.input_quantizer = calibrated(input, x, bits, weight=False)
        x = module(x).detach()
    return model.train(), images


def test_weights_and_inputs_of_a_model_switch_separately() -> None:
    model, images = student()
    model[0].eval()
    before, modes = copy.deepcopy(model), [module.training for module in model.modules()]
    seen = [images, before[:3].eval()(images)]
    changed = switch_bits_(model, {"0": LayerBits(4, 8), "3": LayerBits(8, 3)}, images)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())
    layers: dict[str, Any] = dict(quant_layers(model))
    old: dict[str, Any] = dict(quant_layers(before))
    bits = [[int(q.bits) for q in (layer.weight_quantizer, layer.input_quantizer)] for layer in layers.values()]
    assert bits == [[4, 8], [8, 3]]
    assert {id(parameter) for parameter in changed} == {
        id(layers["0"].weight_quantizer.scale),
        id(layers["3"].input_quantizer.scale),
    }
    new, reference = layers["3"].input_quantizer, old["3"].input_quantizer
    assert new is not None and reference is not None
    alone = switched(reference.eval(), seen[1], 3)
    assert torch.equal(new.scale, alone.scale), "the input is what the old model gives the layer"
    parameter = layers["0"].weight_quantizer.scale
    ratio = parameter / old["0"].weight_quantizer.scale
    torch.testing.assert_close(changed[parameter], 1 / ratio)


def test_inputs_without_images_follow_the_plain_rule() -> None:
    model, _ = student()
    scale = model[3].input_quantizer.scale.detach().clone()
    switch_bits_(model, {"3": LayerBits(8, 5)})
    assert torch.equal(model[3].input_quantizer.scale, scale * 8)


def test_switch_up_and_down_again_restores_the_model() -> None:
    model, _ = student(bits=4)
    before = copy.deepcopy(model.state_dict())
    for bits in (6, 4):
        switch_bits_(model, {"0": LayerBits(bits, bits), "3": LayerBits(bits, bits)})
    for name, tensor in model.state_dict().items():
        if "weight_quantizer" not in name:
            assert torch.equal(tensor, before[name]), name


def test_quantizer_without_a_range_gets_only_its_bits_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    model, images = student(weight=DoReFa, input=DoReFa)
    with caplog.at_level(logging.INFO):
        assert switch_bits_(model, {"0": LayerBits(2, 2), "3": LayerBits(2, 2)}, images) == {}
    assert len([line for line in caplog.messages if "DoReFa has no range of its own" in line]) == 1
    weight = model[3].weight.detach()
    assert torch.equal(model[3].weight_quantizer(weight), calibrated(DoReFa, weight, 2)(weight))


WRONG = [
    ({"conv": LayerBits(4, 4)}, "'conv' is not a quantized layer of this model"),
    ({"0": LayerBits(FULL_PRECISION, 4)}, "the weight of layer '0' is quantized to 8 bits and cannot become 32"),
    ({"0": LayerBits(4, 4), "3": LayerBits(4, 20)}, "layer '3': LSQ: bits must be 1..16, got 20"),
    ({"0": LayerBits(4, 4), "3": LayerBits(1, 4)}, "layer '3': LSQ: 1 bit.* leave no positive code"),
]


@pytest.mark.parametrize(("bits", "line"), WRONG)
@pytest.mark.parametrize("switch", [switch_bits_, partial(calibrate_at_, observer=MinMax)])
def test_impossible_switch_is_refused_before_anything_changes(bits: Any, line: str, switch: Any) -> None:
    model, images = student()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=line):
        switch(model, bits, images)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_switch_of_a_codebook_made_for_other_bits_is_refused() -> None:
    model, images = student(weight=KMeans, bits=4)
    with pytest.raises(ValueError, match="layer '0': KMeans: its tables were made for 4 bits and cannot become 3"):
        switch_bits_(model, {"0": LayerBits(3, 4)}, images)


def test_calibrate_at_equals_a_calibration_with_these_bits() -> None:
    """As if the student had been converted with these bits; what has them already stays."""
    few, images = student(bits=2)
    many, _ = student(bits=8)
    kept = copy.deepcopy(few[3].weight_quantizer.state_dict())
    calibrate_at_(few, {"0": LayerBits(8, 8), "3": LayerBits(2, 8)}, images, MinMax)
    for name in ("0.weight_quantizer", "0.input_quantizer"):
        found, expected = few.get_submodule(name), many.get_submodule(name)
        torch.testing.assert_close(found.scale, expected.scale)
        assert int(found.bits) == 8
    assert all(torch.equal(kept[name], tensor) for name, tensor in few[3].weight_quantizer.state_dict().items())
    assert all(q.enabled for layer in quant_layers(few).values() for q in (layer.weight_quantizer,) if q is not None)


def tied_layers(bits: int) -> nn.Sequential:
    """Two linear layers with one weight and one quantizer for it, calibrated at ``bits``."""
    model = nn.Sequential(*(QuantLinear(source=nn.Linear(6, 6, bias=False)) for _ in range(2)))
    model[1].weight = model[0].weight
    quantizer = LSQ(spec=QuantSpec(bits=bits, shape=(6, 6), signed=True))
    for layer in model:
        layer.weight_quantizer = quantizer
    observer = MinMax(granularity=PerTensor())
    observer.update(model[0].weight)
    quantizer.calibrate_(observer.observed(bits))
    return model


def test_quantizer_of_a_shared_weight_is_switched_once() -> None:
    """Two bits more halve the step twice."""
    model = tied_layers(4)
    before = model[0].weight_quantizer.scale.detach().clone()
    factors = switch_bits_(model, dict.fromkeys("01", LayerBits(6, FULL_PRECISION)))
    torch.testing.assert_close(model[0].weight_quantizer.scale.detach(), before / 4, atol=0, rtol=1e-6)
    assert len(factors) == 1


@pytest.mark.parametrize("others", [{}, {"1": LayerBits(3, FULL_PRECISION)}])
def test_other_bits_for_one_of_the_layers_with_one_weight_are_refused(others: dict[str, LayerBits]) -> None:
    model = tied_layers(4)
    with pytest.raises(ValueError, match=r"layer '0' has its weight in common with 1; give all of them the same"):
        switch_bits_(model, {"0": LayerBits(6, FULL_PRECISION), **others})
    assert int(model[0].weight_quantizer.bits) == 4
