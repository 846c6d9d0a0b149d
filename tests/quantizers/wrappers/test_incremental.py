"""Incremental quantization: what is frozen, when, and that it never moves again."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qtrain.functional.partition import largest_first
from qtrain.nn import QuantLinear
from qtrain.nn.project import partition_weights_, project_weights_
from qtrain.observers.min_max import MinMax
from qtrain.quantizers.binary.bwn import BWN
from qtrain.quantizers.binary.twn import TWN
from qtrain.quantizers.block.ocp_mx import OcpMx
from qtrain.quantizers.codebook.apot import APoT
from qtrain.quantizers.codebook.kmeans import KMeans
from qtrain.quantizers.codebook.power_of_two import PowerOfTwo
from qtrain.quantizers.hooks import begin_step_
from qtrain.quantizers.uniform.affine import Affine
from qtrain.quantizers.uniform.dorefa import DoReFa
from qtrain.quantizers.uniform.lsq import LSQ
from qtrain.quantizers.uniform.stochastic_rounding import StochasticRounding
from qtrain.quantizers.wrappers.incremental import Incremental
from qtrain.quantizers.wrappers.quant_noise import QuantNoise
from qtrain.schedules.plateaus import Plateaus
from qtrain.spec import PerChannel, QuantSpec

SHARES = Plateaus(values=[0.25, 0.5, 0.75, 1.0])
INNER: dict[str, Any] = {
    "affine": Affine,
    "channel": partial(Affine, granularity=PerChannel(0)),
    "lsq": LSQ,
    "inq": partial(PowerOfTwo, scale="power_of_two"),
    "apot": partial(APoT, normalize=False),
    "kmeans": KMeans,
    "stochastic": StochasticRounding,
}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def calibrated(weight: Tensor, bits: int = 4, **options: Any) -> Incremental:
    spec = QuantSpec(bits=bits, shape=tuple(weight.shape), signed=True)
    quantizer = Incremental(spec=spec, **{"quantizer": Affine, "share": SHARES, **options})
    observer = MinMax(granularity=quantizer.granularity)
    observer.update(weight)
    quantizer.calibrate_(observer.observed(bits)._replace(tensor=weight))
    return quantizer.train()


def layer(weight: Tensor, **options: Any) -> tuple[nn.Module, QuantLinear, Incremental]:
    linear = QuantLinear(source=nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    with torch.no_grad():
        linear.weight.copy_(weight)
    quantizer = calibrated(weight, **options)
    linear.weight_quantizer = quantizer
    return nn.Sequential(linear), linear, quantizer


def train(model: nn.Module, steps: range, optimizer: torch.optim.Optimizer, total: int) -> None:
    """As the training module does it; each step's data are a function of its number."""
    for step in steps:
        begin_step_(model, seed=0, step=step, progress=step / total)
        partition_weights_(model)
        optimizer.zero_grad()
        model(noise(8, next(model.parameters()).shape[1], seed=step)).square().mean().backward()
        optimizer.step()
        project_weights_(model)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=12), st.data())
def test_the_largest_come_first_after_those_already_in(values: list[int], data: st.DataObject) -> None:
    already = data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    count = data.draw(st.integers(0, len(values)))
    chosen = largest_first(torch.tensor(values), torch.tensor(already), count)
    order = sorted(range(len(values)), key=lambda i: (not already[i], -values[i], i))
    expected = {i for i in order[:count]} | {i for i, there in enumerate(already) if there}
    assert {i for i, there in enumerate(chosen.tolist()) if there} == expected


def test_a_partition_by_hand() -> None:
    """Steps of 1/4 up to 7/4: of four weights the two largest are rounded, the others stay real."""
    weight = torch.tensor([[1.75, -0.1], [0.9, 0.3]])
    model, linear, quantizer = layer(weight, share=0.5)
    train(model, range(1), torch.optim.SGD(model.parameters(), lr=0.0), 1)
    expected = torch.tensor([[1.75, -0.1], [1.0, 0.3]])
    assert torch.equal(linear.weight, expected)
    assert torch.equal(quantizer.frozen, torch.tensor([[True, False], [True, False]]))
    leaf = expected.clone().requires_grad_()
    result = quantizer(leaf)
    assert torch.equal(result, expected)
    (gradient,) = torch.autograd.grad(result, leaf, torch.full((2, 2), 5.0))
    assert torch.equal(gradient, torch.tensor([[0.0, 5.0], [0.0, 5.0]])), "real weights have their exact gradient"
    assert torch.equal(quantizer.eval()(leaf), torch.tensor([[1.75, 0.0], [1.0, 0.25]])), "deployed, all are quantized"


@pytest.mark.parametrize("by", ["magnitude", "random"])
@pytest.mark.parametrize("name", INNER)
def test_frozen_weights_never_move_again(name: str, by: str) -> None:
    """Under momentum, weight decay and large steps; in the end the deployed weight is what was frozen, bit for bit."""
    model, linear, quantizer = layer(noise(10, 6), quantizer=INNER[name], by=by)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9, weight_decay=0.1)
    state = copy.deepcopy(quantizer.inner.state_dict())
    frozen, values = quantizer.frozen.clone(), linear.weight.detach().clone()
    for step in range(16):
        train(model, range(step, step + 1), optimizer, 16)
        assert int(quantizer.frozen.sum()) == 15 * (1 + step // 4), "25, 50, 75, 100 % of 60"
        assert quantizer.frozen[frozen].all()
        assert torch.equal(linear.weight[frozen], values[frozen])
        frozen, values = quantizer.frozen.clone(), linear.weight.detach().clone()
    assert all(torch.equal(tensor, state[key]) for key, tensor in quantizer.inner.state_dict().items())
    deployed = quantizer.eval()(linear.weight)
    assert torch.equal(deployed, linear.weight)
    assert torch.equal(quantizer.quantize(linear.weight).dequantize(), quantizer.value.view(torch.float32))


def test_each_weight_is_frozen_at_its_current_quantized_value() -> None:
    """The rest goes on learning: values frozen late are those of the trained weight, not of the first."""
    model, linear, quantizer = layer(noise(10, 6))
    first = quantizer.settled(noise(10, 6))
    train(model, range(16), torch.optim.SGD(model.parameters(), lr=0.3), 16)
    late = (linear.weight != first).sum()
    assert late > 5


def test_inq_has_the_powers_of_its_formula() -> None:
    """``{0, +-2^n2 .. +-2^n1}``, ``n1 = floor(log2(4 max|w| / 3))`` (eq. 2), nearest in the linear domain (eq. 4)."""
    weight = noise(10, 6)
    model, linear, _ = layer(weight, quantizer=INNER["inq"], bits=4, share=1.0)
    train(model, range(1), torch.optim.SGD(model.parameters(), lr=0.0), 1)
    top = int((4 * weight.abs().max() / 3).log2().floor())
    powers = torch.tensor([0.0, *(2.0**k for k in range(top - 6, top + 1))])
    nearest = powers[(weight.abs().unsqueeze(-1) - powers).abs().argmin(dim=-1)] * weight.sign()
    assert torch.equal(linear.weight, nearest)


@pytest.mark.parametrize("by", ["magnitude", "random"])
@pytest.mark.parametrize("stop", [3, 4, 5])
def test_resumed_at_a_partition_it_ends_as_if_it_had_not_stopped(by: str, stop: int) -> None:
    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = layer(noise(10, 6), by=by)[0]
        return model, torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)

    whole, optimizer = fresh()
    train(whole, range(12), optimizer, 16)
    first, optimizer = fresh()
    train(first, range(stop), optimizer, 16)
    second, resumed = fresh()
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    train(second, range(stop, 12), resumed, 16)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def test_random_parts_are_a_function_of_the_step() -> None:
    masks = []
    for seed in (0, 0, 1):
        model, _, quantizer = layer(noise(10, 6), by="random", share=0.5)
        begin_step_(model, seed=seed, step=0, progress=0.0)
        partition_weights_(model)
        masks.append(quantizer.frozen.clone())
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[0], largest_first(noise(10, 6).abs(), torch.zeros(10, 6, dtype=torch.bool), 30))


def test_partition_is_due_only_when_the_share_changes() -> None:
    quantizer = calibrated(noise(4, 4))
    due = []
    for step in range(8):
        begin_step_(quantizer, seed=0, step=step, progress=step / 8)
        due.append(quantizer.due)
        if quantizer.due:
            quantizer.partition_(noise(4, 4))
    assert due == [True, False] * 4
    assert not calibrated(noise(4, 4)).due, "outside of training nothing is"


def test_partition_is_found_inside_another_wrapper() -> None:
    make = partial(QuantNoise, quantizer=partial(Incremental, quantizer=Affine, share=1.0), rate=0.5)
    linear: Any = QuantLinear(source=nn.Linear(6, 4))
    linear.weight_quantizer = make(spec=QuantSpec(bits=4, shape=(4, 6), signed=True)).train()
    begin_step_(linear, seed=0, step=0, progress=0.0)
    partition_weights_(nn.Sequential(linear))
    assert linear.weight_quantizer.inner.frozen.all()
    assert torch.equal(linear.weight, linear.weight.round())  # the step of an affine that was not calibrated is 1


def test_frozen_values_are_integers_that_averages_cannot_mix() -> None:
    """A mean of a value and of the zero from before it was frozen would be neither."""
    quantizer = calibrated(noise(4, 4))
    assert not quantizer.value.is_floating_point()
    begin_step_(quantizer, seed=0, step=0, progress=1.0)
    weight = quantizer.partition_(noise(4, 4).bfloat16())
    assert weight.dtype == torch.bfloat16
    assert torch.equal(quantizer.project(weight + 1), weight)


@pytest.mark.parametrize("inner", [TWN, BWN, DoReFa, APoT, OcpMx])
def test_a_quantizer_that_looks_at_the_whole_tensor_is_refused(inner: Any) -> None:
    bits = {TWN: 2, BWN: 1}.get(inner, 4)
    with pytest.raises(ValueError, match=f"Incremental: {inner.__name__} looks at the whole tensor.* take one"):
        calibrated(noise(10, 6), bits=bits, quantizer=inner)


def test_new_calibration_frees_what_was_frozen() -> None:
    """With other steps, values that were frozen before would not be values of the quantizer."""
    model, linear, quantizer = layer(noise(10, 6), share=0.5)
    train(model, range(1), torch.optim.SGD(model.parameters(), lr=0.0), 1)
    assert int(quantizer.frozen.sum()) == 30
    wider = 3 * linear.weight.detach()
    observer = MinMax(granularity=quantizer.granularity)
    observer.update(wider)
    quantizer.calibrate_(observer.observed(4)._replace(tensor=wider))
    assert not quantizer.frozen.any()
    assert torch.equal(quantizer(wider), wider)


def test_bits_cannot_change_and_only_weights_have_parts() -> None:
    with pytest.raises(ValueError, match="cannot become 3"):
        calibrated(noise(4, 4)).set_range_(bits=3, signed=True)
    with pytest.raises(ValueError, match="Incremental: quantizes weights only"):
        Incremental(spec=QuantSpec(bits=4), quantizer=Affine, share=0.5)


@pytest.mark.parametrize(
    ("options", "line"),
    [({"share": 1.5}, r"Incremental: share must be in \[0, 1\], got 1.5"), ({"by": "size"}, "Incremental: by must be")],
)
def test_wrong_options_are_refused(options: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        calibrated(noise(4, 4), **options)
