"""Quantizers around a quantizer: what all of them hand on, blending, and ProxQuant."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from qtrain.observers.min_max import MinMax
from qtrain.quantizers.base import MakeQuantizer, Quantizer
from qtrain.quantizers.binary.binary_connect import BinaryConnect
from qtrain.quantizers.binary.bnn import BNN
from qtrain.quantizers.binary.twn import TWN
from qtrain.quantizers.binary.xnor import XNOR
from qtrain.quantizers.hooks import begin_step_, project
from qtrain.quantizers.uniform.affine import Affine
from qtrain.quantizers.uniform.lsq import LSQ
from qtrain.quantizers.wrappers.blend import Blend
from qtrain.quantizers.wrappers.prox_quant import ProxQuant, prox_l1, prox_l2
from qtrain.schedules.linear import Linear
from qtrain.spec import Observed, PerChannel, QuantSpec

INPUT = QuantSpec(bits=4)
HALF: Any = partial(Blend, share=0.5)
WRAPPERS: list[Any] = [HALF, partial(ProxQuant, rate=0.1)]


def weight_spec(*shape: int, bits: int = 2) -> QuantSpec:
    return QuantSpec(bits=bits, shape=shape, signed=True)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def calibrated(quantizer: Quantizer, x: Tensor) -> Quantizer:
    observer = MinMax(granularity=quantizer.granularity)
    observer.update(x)
    quantizer.calibrate_(observer.observed(int(quantizer.bits))._replace(tensor=x))
    return quantizer


def gradient(quantizer: Quantizer, x: Tensor, upstream: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(quantizer(leaf), leaf, upstream)
    return grad


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_wrapper_has_the_abilities_of_its_inner_quantizer(wrap: Any) -> None:
    ternary = wrap(spec=weight_spec(2, 3), quantizer=partial(TWN, granularity=PerChannel(0)))
    assert (ternary.widths, ternary.keeps_zero, ternary.switchable) == (range(2, 3), True, True)
    assert ternary.serves == {"weight"}
    assert ternary.granularity == PerChannel(0)
    assert (int(ternary.code_low), int(ternary.code_high)) == (-1, 1)
    binary = wrap(spec=weight_spec(2, 3, bits=1), quantizer=BNN)
    assert (binary.widths, binary.keeps_zero) == (range(1, 2), False)
    with pytest.raises(ValueError, match="BNN: bits must be 1, got 2"):
        wrap(spec=weight_spec(2, 3), quantizer=BNN)
    assert Blend.widths == ProxQuant.widths == range(1, 17), "the classes themselves stay as they were"


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("quantizer", [LSQ, TWN, partial(HALF, quantizer=Affine)])
def test_in_eval_mode_and_storage_a_wrapper_is_its_inner_quantizer(wrap: Any, quantizer: MakeQuantizer) -> None:
    x = noise(4, 6)
    wrapped = calibrated(wrap(spec=weight_spec(4, 6), quantizer=quantizer), x).eval()
    bare = calibrated(quantizer(spec=weight_spec(4, 6)), x).eval()
    assert torch.equal(wrapped(x), bare(x))
    assert torch.equal(wrapped.quantize(x).codes, bare.quantize(x).codes)
    assert wrapped.storage_bits() == bare.storage_bits() > 0


def test_wrapper_takes_over_the_calibrated_sign() -> None:
    quantizer = HALF(spec=INPUT, quantizer=LSQ)
    assert (int(quantizer.code_low), bool(quantizer.initialized)) == (-8, False)
    one = torch.tensor(1.0)
    quantizer.calibrate_(Observed(torch.tensor(0.0), 3 * one, one))
    for each in (quantizer, quantizer.inner):
        assert (int(each.code_low), int(each.code_high), bool(each.initialized)) == (0, 15, True)
    quantizer.set_range_(bits=2, signed=False)
    assert int(quantizer.inner.code_high) == int(quantizer.code_high) == 3


def test_a_step_reaches_the_inner_quantizer() -> None:
    quantizer = Blend(
        spec=weight_spec(4, 64, bits=1), quantizer=partial(BinaryConnect, stochastic=True), share=1.0
    ).train()
    zeros, draws = torch.zeros(4, 64), []
    for step in (1, 2, 1):
        begin_step_(quantizer, seed=0, step=step, progress=0.5)
        draws.append(quantizer(zeros))
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1])


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapper_hands_on_the_projection_of_the_weight(wrap: Any) -> None:
    quantizer = wrap(spec=weight_spec(3, bits=1), quantizer=BNN)
    within = quantizer.project(torch.tensor([-7.0, 0.5, 3.0]))
    assert within.abs().max() <= 1
    assert torch.equal(project(LSQ(spec=weight_spec(3)), within), within), "no projection, no change"


def test_a_factor_on_the_output_cannot_be_wrapped() -> None:
    with pytest.raises(ValueError, match=r"Blend: XNOR needs a factor on the layer's output, .*take bnn"):
        HALF(spec=QuantSpec(bits=1), quantizer=XNOR)


def test_blend_by_hand_and_at_its_ends() -> None:
    """Affine with step 1: 0.4 is rounded to 0, 2.7 to 3; a quarter of the way from x there."""
    x = torch.tensor([0.4, 2.7, -1.2])
    quantizer = Blend(spec=weight_spec(3, bits=4), quantizer=Affine, share=0.25).train()
    torch.testing.assert_close(quantizer(x), torch.tensor([0.3, 2.775, -1.15]))
    for share, expected in ((0.0, x), (1.0, torch.tensor([0.0, 3.0, -1.0]))):
        assert torch.equal(Blend(spec=weight_spec(3, bits=4), quantizer=Affine, share=share).train()(x), expected)


def test_blend_follows_its_schedule() -> None:
    quantizer = Blend(
        spec=weight_spec(3, bits=4), quantizer=Affine, share=Linear(start=0.0, end=1.0, finish=0.5)
    ).train()
    x, seen = torch.tensor([0.4, 2.7, -1.2]), []
    for step, progress in enumerate((0.0, 0.25, 0.5, 1.0)):
        begin_step_(quantizer, seed=0, step=step, progress=progress)
        seen.append(float(quantizer.share))
    assert seen == [0.0, 0.5, 1.0, 1.0]
    assert torch.equal(quantizer(x), quantizer.eval()(x))


def test_blend_gradient_is_exact_plus_scaled_straight_through() -> None:
    """Inside the range 1 with straight-through; without it the true derivative, here by differences of the forward."""
    x, upstream = torch.tensor([0.3, 2.7, -1.2, 9.0]), torch.tensor([1.0, 2.0, 4.0, 8.0])
    make = partial(Blend, spec=weight_spec(4, bits=4), quantizer=Affine, share=0.25)
    torch.testing.assert_close(gradient(make().train(), x, upstream), upstream * torch.tensor([1.0, 1.0, 1.0, 0.75]))
    exact = make(straight_through=False).train()
    slope = (exact(x + 0.01) - exact(x - 0.01)) / 0.02
    torch.testing.assert_close(gradient(exact, x, upstream), upstream * slope, rtol=1e-3, atol=1e-3)


def test_inner_quantizer_parameters_get_gradients_in_a_blend() -> None:
    x, upstream = noise(4, 6), noise(4, 6, seed=1)
    for straight_through in (True, False):
        quantizer = HALF(spec=weight_spec(4, 6), quantizer=LSQ, straight_through=straight_through).train()
        calibrated(quantizer, x)
        (grad,) = torch.autograd.grad(quantizer(x), quantizer.inner.scale, upstream)
        (alone,) = torch.autograd.grad(quantizer.inner(x), quantizer.inner.scale, upstream)
        torch.testing.assert_close(grad, alone / 2)


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.7])
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_proximal_operators_minimize_their_definition(norm: str, rate: float) -> None:
    """``argmin_v (v - w)^2 / 2 + rate R(v)`` with the W-shaped R(v) = |v - Q(v)| or its square, on a fine grid."""
    grid = torch.linspace(-3, 3, 60001, dtype=torch.float64)
    off = (grid - grid.round()).abs()
    regularizer = off if norm == "l1" else off.square()
    w = torch.tensor([-1.8, -0.97, -0.4, 0.0, 0.3, 0.45, 1.2, 2.05], dtype=torch.float64)
    best = torch.stack([grid[(0.5 * (grid - each).square() + rate * regularizer).argmin()] for each in w])
    moved = (prox_l1 if norm == "l1" else prox_l2)(w, w.round(), torch.tensor(rate, dtype=torch.float64))
    torch.testing.assert_close(moved, best, rtol=0, atol=2e-4)


def prox(norm: str = "l1", **options: Any) -> ProxQuant:
    quantizer = ProxQuant(spec=weight_spec(64, bits=4), quantizer=Affine, norm=norm, **options)
    return quantizer.train()


@pytest.mark.parametrize(("norm", "end"), [("l1", 0.2), ("l2", 20.0)])
def test_prox_quant_trains_real_weights_that_end_quantized(norm: str, end: float) -> None:
    """Gradient steps on a quadratic from its minimum: drawn ever harder, each weight ends at the nearest value."""
    target = (noise(64) * 3).clamp(-6, 6)
    quantizer = prox(norm, rate=Linear(start=0.0, end=end), hard_from=1.0)
    w = target
    for step in range(200):
        begin_step_(quantizer, seed=0, step=step, progress=step / 200)
        assert torch.equal(quantizer(w), w), "the forward has the real weight"
        assert torch.equal(gradient(quantizer, w, target), target), "and its exact gradient"
        w = quantizer.project(w - 0.1 * (w - target))
    torch.testing.assert_close(w, target.round(), rtol=0, atol=0.01)


def test_prox_quant_ends_with_quantized_weights_that_stay() -> None:
    quantizer, w = prox(rate=0.01, hard_from=0.75), noise(64)
    begin_step_(quantizer, seed=0, step=1, progress=0.74)
    assert torch.equal(quantizer(w), w)
    assert not torch.equal(quantizer.project(w), w.round())
    begin_step_(quantizer, seed=0, step=2, progress=0.75)
    assert torch.equal(quantizer(w), w.round())
    settled = quantizer.project(w)
    assert torch.equal(settled, w.round())
    assert torch.equal(quantizer.project(settled + 0.3), settled)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(Blend, share=1.5), r"Blend: share must be in \[0, 1\], got 1.5; or give a schedule"),
        (partial(ProxQuant, rate=-1.0), "ProxQuant: rate must be at least 0, got -1.0; or give a schedule"),
        (partial(ProxQuant, rate=0.1, hard_from=2.0), r"ProxQuant: hard_from .* must be in \[0, 1\], got 2.0"),
        (partial(ProxQuant, rate=0.1, norm="l3"), "ProxQuant: norm must be 'l1' or 'l2', got 'l3'"),
    ],
)
def test_wrong_options_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(spec=weight_spec(2, 2), quantizer=LSQ)


def test_prox_quant_is_for_weights() -> None:
    with pytest.raises(ValueError, match="ProxQuant: quantizes weights only, not an input; name another"):
        ProxQuant(spec=INPUT, quantizer=LSQ, rate=0.1)
