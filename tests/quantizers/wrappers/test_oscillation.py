"""Oscillations: counted, dampened and frozen as the paper has it, by a second computation weight by weight."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from qtrain.functional.oscillation import distance_to_codes
from qtrain.observers.min_max import MinMax
from qtrain.quantizers.codebook.power_of_two import PowerOfTwo
from qtrain.quantizers.hooks import begin_step_
from qtrain.quantizers.uniform.affine import Affine
from qtrain.quantizers.uniform.dorefa import DoReFa
from qtrain.quantizers.uniform.lsq import LSQ
from qtrain.quantizers.uniform.lsq_plus import LSQPlus
from qtrain.quantizers.uniform.stochastic_rounding import StochasticRounding
from qtrain.quantizers.wrappers.blend import Blend
from qtrain.quantizers.wrappers.oscillation import Oscillation, oscillating_share
from qtrain.quantizers.wrappers.outlier import Outlier
from qtrain.schedules.linear import Linear
from qtrain.spec import PerChannel, QuantSpec

CHANNELS = PerChannel(0)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def wrapped(shape: tuple[int, ...], bits: int = 3, quantizer: Any = LSQ, **options: Any) -> Any:
    """In training, with steps of one where they are not calibrated."""
    spec = QuantSpec(bits=bits, shape=shape, signed=True)
    return Oscillation(spec=spec, quantizer=quantizer, **options).train()


class OneWeight:
    """Algorithm 1 for a single weight, in Python's numbers."""

    def __init__(self, momentum: float, threshold: float) -> None:
        self.m, self.threshold = momentum, threshold
        self.code: int | None = None
        self.last_change = 0
        self.frequency = 0.0
        self.frozen: int | None = None
        self.average = 0.0

    def after_step(self, weight: float, step: float, low: int, high: int) -> float:
        if self.frozen is not None:
            return self.frozen * step
        code = round(min(max(weight / step, low), high))
        if self.code is None:
            self.code, self.average = code, float(code)
            return weight
        change = code - self.code
        oscillates = change * self.last_change < 0
        self.last_change = change or self.last_change
        self.frequency = self.m * oscillates + (1 - self.m) * self.frequency
        self.average = self.m * code + (1 - self.m) * self.average
        self.code = code
        if self.frequency > self.threshold:
            self.frozen = round(self.average)
            return self.frozen * step
        return weight


@pytest.mark.parametrize("inner", [LSQ, LSQPlus, Affine, partial(LSQ, granularity=CHANNELS), StochasticRounding])
def test_counting_and_freezing_weight_by_weight(inner: Any) -> None:
    """Random walks near the thresholds between codes, under a step that moves as a learned one does."""
    shape, momentum, threshold = (4, 6), 0.05, 0.12
    quantizer = wrapped(shape, quantizer=inner, momentum=momentum, threshold=threshold)
    weight = noise(*shape)
    reference = [OneWeight(momentum, threshold) for _ in range(24)]
    low, high = int(quantizer.code_low), int(quantizer.code_high)
    for step in range(60):
        weight = weight + 0.4 * noise(*shape, seed=step + 1)
        with torch.no_grad():
            quantizer.inner.scale.mul_(1.003)
        sizes = quantizer.spread(quantizer.step(), weight).expand(shape).reshape(-1).tolist()
        values = zip(reference, weight.reshape(-1).tolist(), sizes, strict=True)
        expected = [one.after_step(value, size, low, high) for one, value, size in values]
        weight = quantizer.project(weight)
        torch.testing.assert_close(weight.reshape(-1), torch.tensor(expected), rtol=1e-6, atol=1e-6)
    for name in ("frequency", "average"):
        live = [i for i, one in enumerate(reference) if one.frozen is None]
        found = getattr(quantizer, name).reshape(-1)[live]
        torch.testing.assert_close(found, torch.tensor([getattr(reference[i], name) for i in live]))
    frozen = torch.tensor([one.frozen is not None for one in reference])
    assert torch.equal(quantizer.frozen.reshape(-1), frozen)
    assert 3 <= int(frozen.sum()) <= 21, "a test that freezes none or all would show little"


def test_only_reversals_of_a_code_are_counted() -> None:
    quantizer = wrapped((3,), momentum=0.5)
    for a, b in ((0.4, 0.4), (0.6, 0.6), (0.4, 1.6), (0.6, 2.6)):  # 0 1 0 1, and 0 1 2 3
        quantizer.project(torch.tensor([a, b, 0.0]))
    torch.testing.assert_close(quantizer.frequency, torch.tensor([0.75, 0.0, 0.0]))
    assert float(oscillating_share(quantizer)) == pytest.approx(1 / 3)
    assert not quantizer.frozen.any(), "without a threshold nothing is frozen"


def test_frozen_weight_keeps_its_code_while_the_step_learns() -> None:
    quantizer = wrapped((2,), momentum=0.5, threshold=0.4)
    for a in (0.6, 0.4, 0.6):  # codes 1 0 1: average 0.75, rounded 1
        weight = quantizer.project(torch.tensor([a, 2.0]))
    assert torch.equal(quantizer.frozen, torch.tensor([True, False]))
    assert torch.equal(weight, torch.tensor([1.0, 2.0]))
    with torch.no_grad():
        quantizer.inner.scale.fill_(0.5)
    assert torch.equal(quantizer.project(torch.tensor([-9.0, 1.3])), torch.tensor([0.5, 1.3]))
    assert torch.equal(quantizer.eval()(torch.tensor([0.5, 1.3])), torch.tensor([0.5, 1.5]))


def test_dampening_by_hand() -> None:
    """Three bits, steps of one: codes -4 to 3; the gradient is ``2 (w - Q(w))``, and nothing beyond the range."""
    quantizer = wrapped((5,), dampening=0.5)
    with torch.no_grad():
        quantizer.inner.scale.fill_(1.0)
    weight = torch.tensor([0.4, 0.6, -1.2, 7.0, -4.3], requires_grad=True)
    inner = LSQ(spec=quantizer.spec)
    upstream = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    result = quantizer(weight)
    assert torch.equal(result, inner(weight)), "values are those of the inner quantizer"
    found = torch.autograd.grad(result, [weight, quantizer.inner.scale], upstream)
    alone = torch.autograd.grad(inner(weight), [weight, inner.scale], upstream)
    pull = 0.5 * 2 * torch.tensor([0.4, -0.4, -0.2, 0.0, 0.0])
    torch.testing.assert_close(found[0], alone[0] + pull)
    assert torch.equal(found[1], alone[1]), "the step is not drawn"


def test_the_dampening_term_against_its_formula_and_differences() -> None:
    """Steps of a half, codes -4 to 3; away from the edges of bins, where the term is not differentiable."""
    values, step, low, high = [0.3, -0.7, 0.1, 2.9, -3.0], torch.tensor(0.5), torch.tensor(-4.0), torch.tensor(3.0)

    def term(values: list[float]) -> float:
        return sum((min(max(round(w / 0.5), -4), 3) * 0.5 - min(max(w, -2.0), 1.5)) ** 2 for w in values)

    leaf = torch.tensor(values, requires_grad=True)
    found = distance_to_codes(leaf, step, low, high)
    assert float(found.detach()) == pytest.approx(term(values), rel=1e-5)
    (gradient,) = torch.autograd.grad(found, leaf)
    for i in range(5):
        ends = [term([w + sign * 1e-4 * (j == i) for j, w in enumerate(values)]) for sign in (-1, 1)]
        assert float(gradient[i]) == pytest.approx((ends[1] - ends[0]) / 2e-4, abs=1e-5)


def test_rates_follow_their_schedules() -> None:
    quantizer = wrapped((3,), dampening=Linear(start=0.0, end=0.1), threshold=Linear(start=0.1, end=0.01))
    seen = []
    for step, progress in enumerate((0.0, 0.5, 1.0)):
        begin_step_(quantizer, seed=0, step=step, progress=progress)
        seen.append((float(quantizer.dampening), float(quantizer.threshold)))
    assert seen == [pytest.approx((0.0, 0.1)), pytest.approx((0.05, 0.055)), pytest.approx((0.1, 0.01))]


def test_change_of_bits_restarts_counting_and_unfreezes() -> None:
    quantizer = wrapped((2,), bits=4, momentum=0.5, threshold=0.4)
    for a in (0.6, 0.4, 0.6):
        quantizer.project(torch.tensor([a, 2.0]))
    assert quantizer.frozen.any()
    quantizer.set_range_(bits=3, signed=True)
    moved = torch.tensor([0.4, -3.0])
    assert torch.equal(quantizer.project(moved), moved)
    assert not quantizer.frozen.any() and not quantizer.frequency.any() and not quantizer.direction.any()
    assert quantizer.code.tolist() == quantizer.average.tolist() == [0, -3]


def test_projection_does_not_wait_for_the_device() -> None:
    """One graph without a break, which a read of a tensor would cause."""
    quantizer = wrapped((4, 6), threshold=0.02, quantizer=partial(LSQ, granularity=CHANNELS))
    twin = wrapped((4, 6), threshold=0.02, quantizer=partial(LSQ, granularity=CHANNELS))
    compiled = torch.compile(quantizer.project, fullgraph=True, backend="eager")
    for seed in range(3):
        assert torch.equal(compiled(noise(4, 6, seed=seed)), twin.project(noise(4, 6, seed=seed)))
    assert torch.equal(quantizer.frequency, twin.frequency)


def test_state_resumes_from_a_file() -> None:
    whole, first = (wrapped((4, 6), momentum=0.2, threshold=0.1) for _ in range(2))
    walk = [noise(4, 6, seed=seed) for seed in range(8)]
    for weight in walk:
        whole.project(weight)
    for weight in walk[:4]:
        first.project(weight)
    second = wrapped((4, 6), momentum=0.2, threshold=0.1)
    second.load_state_dict(first.state_dict())
    for weight in walk[4:]:
        second.project(weight)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    assert whole.frozen.any()


def test_dampening_keeps_weights_from_the_edges() -> None:
    """What it is for: a weight whose optimum lies between two codes settles in the middle of a bin."""

    def oscillations(dampening: float) -> float:
        quantizer = wrapped((8,), momentum=0.05, dampening=dampening)
        weight = torch.linspace(0.1, 0.9, 8).requires_grad_()
        goal = torch.full((8,), 0.3)  # no code: straight-through gradients push to and fro
        optimizer = torch.optim.SGD([weight], lr=0.05)
        for _ in range(200):
            optimizer.zero_grad()
            (quantizer(weight) - goal).square().sum().backward()
            optimizer.step()
            quantizer.project(weight.detach())
        return float(quantizer.frequency.mean())

    assert oscillations(0.0) > 0.05
    assert oscillations(3.0) < 0.01 * oscillations(0.0)


@pytest.mark.parametrize(
    "inner", [PowerOfTwo, DoReFa, partial(Affine, symmetric=False), partial(Outlier, quantizer=LSQ)]
)
def test_inner_quantizer_without_even_steps_is_refused(inner: Any) -> None:
    with pytest.raises(ValueError, match=r"Oscillation: counts codes that are whole steps from zero, and .* has none"):
        wrapped((4, 6), quantizer=inner)


def test_blend_inside_oscillation_is_accepted() -> None:
    quantizer = wrapped((2,), quantizer=partial(Blend, quantizer=LSQ, share=0.5), momentum=0.5)
    for a in (0.6, 0.4, 0.6):
        quantizer.project(torch.tensor([a, 2.0]))
    assert quantizer.frequency.tolist() == [0.5, 0.0]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"dampening": -1.0}, "Oscillation: dampening must be at least 0, got -1"),
        ({"dampening": math.nan}, "Oscillation: dampening must be at least 0, got nan"),
        ({"threshold": 0.0}, "Oscillation: threshold must be above 0, got 0"),
        ({"momentum": 1.0}, r"Oscillation: momentum must be in \(0, 1\), got 1"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        wrapped((4,), **options)


def test_calibrated_wrapper_equals_its_inner_quantizer() -> None:
    weight = noise(4, 6)
    quantizer, bare = wrapped((4, 6), dampening=0.1), LSQ(spec=QuantSpec(bits=3, shape=(4, 6), signed=True))
    for each in (quantizer, bare):
        observer = MinMax(granularity=each.granularity)
        observer.update(weight)
        each.calibrate_(observer.observed(3)._replace(tensor=weight))
    assert torch.equal(quantizer(weight), bare(weight))
    assert torch.equal(quantizer.quantize(weight).codes, bare.quantize(weight).codes)
