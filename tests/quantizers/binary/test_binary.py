"""Quantizers of one bit: BinaryConnect, BWN, XNOR-Net, BNN and BNN+, each against its paper's formula."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qtrain.observers.min_max import MinMax
from qtrain.quantizers.base import Quantizer
from qtrain.quantizers.binary.binary_connect import BinaryConnect
from qtrain.quantizers.binary.bnn import BNN
from qtrain.quantizers.binary.bnn_plus import BNNPlus, swish_sign
from qtrain.quantizers.binary.bwn import BWN
from qtrain.quantizers.binary.xnor import XNOR
from qtrain.quantizers.hooks import Projection, ScalesOutput, StepAware, begin_step_
from qtrain.spec import PerChannel, PerTensor, QuantSpec

INPUT = QuantSpec(bits=1)


def weight_spec(*shape: int) -> QuantSpec:
    return QuantSpec(bits=1, shape=shape, signed=True)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradient(quantizer: Quantizer, x: Tensor, upstream: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(quantizer(leaf), leaf, upstream)
    return grad


@pytest.mark.parametrize("kind", [BinaryConnect, BWN, BNN, BNNPlus])
def test_more_than_one_bit_is_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match=f"{kind.__name__}: bits must be 1, got 2; take another quantizer"):
        kind(spec=QuantSpec(bits=2, shape=(2, 2), signed=True))


@pytest.mark.parametrize("kind", [BinaryConnect, BWN])
def test_weight_quantizers_refuse_inputs(kind: Any) -> None:
    with pytest.raises(ValueError, match=f"{kind.__name__}: quantizes weights only, not an input"):
        kind(spec=INPUT)


def test_zero_counts_as_positive_and_a_sign_without_factor_costs_one_bit() -> None:
    """BinaryConnect eq. 1 and BNN eq. 1: +1 if w >= 0."""
    for quantizer in (BinaryConnect(spec=weight_spec(5)), BNN(spec=weight_spec(5)), BNN(spec=INPUT), XNOR(spec=INPUT)):
        x = torch.tensor([-2.0, -1e-30, 0.0, 1e-30, 7.0])
        assert quantizer(x).tolist() == [-1, -1, 1, 1, 1]
        stored = quantizer.quantize(x)
        assert stored.codes.tolist() == [[0, 0, 1, 1, 1]]
        assert stored.nbits == 5


def test_binary_connect_draws_one_with_the_probability_of_the_hard_sigmoid() -> None:
    """Eq. 2-3. 4000 draws of each weight; five standard deviations of the share are at most 0.04."""
    w = torch.tensor([-1.5, -1.0, -0.6, -0.2, 0.0, 0.3, 0.9, 1.0, 2.0]).repeat(4000, 1)
    quantizer = BinaryConnect(spec=weight_spec(*w.shape), stochastic=True).train()
    begin_step_(quantizer, seed=1, step=7, progress=0.0)
    drawn = quantizer(w)
    assert set(drawn.unique().tolist()) == {-1.0, 1.0}
    share = (drawn > 0).double().mean(dim=0)
    expected = torch.tensor([0.0, 0.0, 0.2, 0.4, 0.5, 0.65, 0.95, 1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(share, expected, rtol=0, atol=0.04)
    assert share[[0, 1, 7, 8]].tolist() == [0, 0, 1, 1], "certain at the ends"
    assert torch.equal(quantizer.eval()(w), torch.where(w >= 0, 1.0, -1.0)), "deterministic in eval mode"


def test_binary_connect_draws_anew_in_each_step() -> None:
    quantizer = BinaryConnect(spec=weight_spec(8, 64), stochastic=True).train()
    assert isinstance(quantizer, StepAware)
    zeros, draws = torch.zeros(8, 64), []
    for step in (1, 2, 1):
        begin_step_(quantizer, seed=0, step=step, progress=0.0)
        draws.append(quantizer(zeros))
    assert torch.equal(draws[0], draws[2])
    assert 0.35 < (draws[0] == draws[1]).double().mean() < 0.65


@pytest.mark.parametrize("stochastic", [False, True])
def test_binary_connect_passes_the_gradient_and_clips_the_weight(stochastic: bool) -> None:
    w, upstream = noise(4, 3) * 2, noise(4, 3, seed=1)
    quantizer = BinaryConnect(spec=weight_spec(4, 3), stochastic=stochastic)
    assert torch.equal(gradient(quantizer, w, upstream), upstream), "also where |w| > 1"
    assert isinstance(quantizer, Projection)
    assert quantizer.project(torch.tensor([-3.0, -0.5, 1.5])).tolist() == [-1.0, -0.5, 1.0]


def test_bnn_stops_the_gradient_beyond_one_and_clips_the_weight() -> None:
    x, upstream = torch.tensor([-1.5, -1.0, -0.2, 0.0, 1.0, 1.01]), torch.arange(1.0, 7.0)
    quantizer = BNN(spec=weight_spec(6))
    assert gradient(quantizer, x, upstream).tolist() == [0, 2, 3, 4, 5, 0]
    assert quantizer.project(x).tolist() == pytest.approx([-1.0, -1.0, -0.2, 0.0, 1.0, 1.0])


def test_bwn_is_the_nearest_of_all_scaled_binary_filters() -> None:
    """Eq. 2: all 2^6 binary filters, each with its own best factor, tried one by one in float64."""
    w = noise(5, 6)
    found = BWN(spec=weight_spec(5, 6)).quantize(w)
    for row, stored_signs, alpha in zip(w.double(), found.codes[0] * 2 - 1, found.scale[0], strict=True):
        best = min(
            (float((row - float(row @ b) / 6 * b).square().sum()), float(row @ b) / 6, b.tolist())
            for b in (torch.tensor(signs, dtype=torch.float64) for signs in itertools.product((-1, 1), repeat=6))
            if row @ b >= 0
        )
        assert stored_signs.tolist() == best[2]
        assert float(alpha) == pytest.approx(best[1], rel=1e-6)


@pytest.mark.parametrize(("granularity", "n", "shape"), [(PerChannel(0), 18, (4, 1, 1, 1)), (PerTensor(), 72, ())])
def test_bwn_has_the_papers_gradient(granularity: Any, n: int, shape: tuple[int, ...]) -> None:
    """§3.1: dC/dW = dC/dW~ (1/n + alpha 1[|W| <= 1])."""
    w, upstream = noise(4, 2, 3, 3) * 1.5, noise(4, 2, 3, 3, seed=1)
    quantizer = BWN(spec=weight_spec(4, 2, 3, 3), granularity=granularity)
    magnitude = w.double().abs()
    alpha = magnitude.mean(dim=(1, 2, 3), keepdim=True) if shape else magnitude.mean()
    expected = upstream.double() * (1 / n + alpha * (magnitude <= 1))
    torch.testing.assert_close(gradient(quantizer, w, upstream).double(), expected, rtol=1e-5, atol=1e-7)
    assert quantizer.storage_bits() == 32 * w.numel() // n


CONVOLUTIONS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Conv1d(3, 4, 3, stride=2, padding=1), (2, 3, 9)),
    (nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (2, 3, 7, 6)),
    (nn.Conv2d(4, 6, 3, padding="same", groups=2), (2, 4, 5, 5)),
    (nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (2, 3, 5, 4)),
    (nn.Conv3d(2, 3, 2, padding=1), (1, 2, 3, 4, 3)),
]


@pytest.mark.parametrize(("layer", "shape"), CONVOLUTIONS)
def test_xnors_map_is_the_mean_magnitude_that_an_output_looks_at(layer: Any, shape: tuple[int, ...]) -> None:
    """Eq. 11, position by position: the output of a copy with one weight set tells which inputs a position sees."""
    quantizer, x = XNOR(spec=INPUT), noise(*shape)
    assert isinstance(quantizer, ScalesOutput)
    factor = quantizer.output_factor(x, layer)
    output = layer(x)
    expected = torch.zeros_like(output, dtype=torch.float64)
    seen = x.clone().requires_grad_()
    with torch.no_grad():
        layer.weight.fill_(1.0)
    reached = layer(seen)
    for place in itertools.product(*(range(n) for n in output.shape)):
        # With all weights 1 the gradient counts how often each input enters this one output.
        (count,) = torch.autograd.grad(reached[place], seen, retain_graph=True)
        elements = layer.weight[0].numel()
        expected[place] = float((count * x.abs()).sum()) / elements
    torch.testing.assert_close(factor.expand_as(output).double(), expected, rtol=1e-5, atol=1e-6)


def test_xnors_map_of_a_linear_layer_and_without_map() -> None:
    x = torch.tensor([[1.0, -3.0], [0.0, 0.5]])
    layer = nn.Linear(2, 3)
    assert XNOR(spec=INPUT).output_factor(x, layer).tolist() == [[2.0], [0.25]]
    assert XNOR(spec=INPUT, scale_map=False).output_factor(x, layer).tolist() == 1.0
    with pytest.raises(ValueError, match=r"XNOR: the scale map is defined for .*not for ConvTranspose2d; give"):
        XNOR(spec=INPUT).output_factor(x, nn.ConvTranspose2d(1, 1, 1))
    with pytest.raises(ValueError, match="XNOR: quantizes inputs only, not a weight"):
        XNOR(spec=weight_spec(2, 2))


def calibrated(x: Tensor, **options: Any) -> BNNPlus:
    quantizer = BNNPlus(spec=weight_spec(*x.shape), **options)
    observer = MinMax(granularity=quantizer.granularity)
    observer.update(x)
    quantizer.calibrate_(observer.observed(1))
    return quantizer


@pytest.mark.parametrize("beta", [1.0, 5.0, 10.0])
def test_bnn_plus_has_the_slope_of_its_paper(beta: float) -> None:
    """d SS_beta / dx = beta (2 - beta x tanh(beta x / 2)) / (1 + cosh(beta x)), and SS_beta approaches the sign."""
    x, upstream = noise(50), noise(50, seed=1)
    quantizer = calibrated(x, beta=beta, strength=0.0)
    t = beta * x.double()
    alpha = x.double().abs().mean()
    expected = upstream * alpha * beta * (2 - t * torch.tanh(t / 2)) / (1 + torch.cosh(t))
    torch.testing.assert_close(gradient(quantizer, x, upstream).double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(quantizer(x).double(), alpha * x.double().sign(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(swish_sign(x, 1e6), x.sign())


@pytest.mark.parametrize("kind", ["l1", "l2"])
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0)])
def test_bnn_plus_adds_its_regularizer_to_the_gradient(kind: str, granularity: Any) -> None:
    """For weights: the gradient is that of ``loss + strength * R``, R in float64 by finite differences."""
    w, upstream = noise(3, 4), noise(3, 4, seed=1)
    make = partial(calibrated, w, granularity=granularity, regularizer=kind)
    grads = []
    for quantizer in (make(strength=0.0), make(strength=0.1)):
        leaf = w.clone().requires_grad_()
        grads.append(torch.autograd.grad(quantizer(leaf), [leaf, quantizer.alpha], upstream))

    def penalty(w: Tensor, alpha: Tensor) -> Tensor:
        off = alpha - w.abs()
        return 0.1 * (off.abs() if kind == "l1" else off**2).sum()

    at = [w.double(), make().alpha.detach().double()]
    for argument in (0, 1):
        slopes = torch.zeros_like(at[argument])
        for place in itertools.product(*(range(n) for n in slopes.shape)):
            above, below = [t.clone() for t in at], [t.clone() for t in at]
            above[argument][place] += 1e-6
            below[argument][place] -= 1e-6
            slopes[place] = (penalty(*above) - penalty(*below)) / 2e-6
        added = (grads[1][argument] - grads[0][argument]).double()
        torch.testing.assert_close(added, slopes, rtol=1e-3, atol=1e-4)


def test_bnn_plus_learns_its_factor_and_leaves_inputs_without_regularizer() -> None:
    x, upstream = noise(20), noise(20, seed=1)
    quantizer = BNNPlus(spec=INPUT, strength=10.0)
    (grad,) = torch.autograd.grad(quantizer(x), quantizer.alpha, upstream)
    torch.testing.assert_close(grad, (upstream * x.sign()).sum())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "BNNPlus: beta must be positive, got 0.0; 5 is usual"),
        ({"regularizer": "l3"}, "BNNPlus: regularizer must be 'l1' or 'l2', got 'l3'"),
        ({"strength": -1.0}, "BNNPlus: strength must be at least 0, got -1.0"),
    ],
)
def test_bnn_plus_refuses_invalid_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BNNPlus(spec=INPUT, **options)


@pytest.mark.parametrize("kind", [BNN, BNNPlus, XNOR])
def test_inputs_that_are_never_negative_are_compared_with_their_mean(kind: Any) -> None:
    """Behind a ReLU all signs would be 1; inputs of both signs, and center=False, keep the paper's threshold of 0."""
    relu = torch.tensor([0.0, 0.0, 1.0, 3.0])
    for x, center, threshold in ((relu, True, 1.0), (relu, False, 0.0), (relu - 0.5, True, 0.0)):
        quantizer = kind(spec=INPUT, center=center)
        observer = MinMax(granularity=PerTensor())
        observer.update(x)
        quantizer.calibrate_(observer.observed(1))
        assert float(quantizer.threshold) == threshold
        assert quantizer.quantize(x).codes.tolist() == [(x >= threshold).int().tolist()]
    assert kind is XNOR or kind(spec=weight_spec(4)).threshold is None
    if kind is XNOR:
        centered = XNOR(spec=INPUT)
        centered.threshold.fill_(1.0)
        assert centered.output_factor(relu, nn.Linear(4, 1)).tolist() == [1.0], "(1 + 1 + 0 + 2) / 4"


def test_binary_connect_glorot_bound_scales_values_and_probabilities() -> None:
    """H = sqrt(1.5 / ((8 + 4) 9)); a weight of -H / 2 is H in a quarter of the draws."""
    bound = (1.5 / 108) ** 0.5
    quantizer = BinaryConnect(spec=weight_spec(8, 4, 3, 3), bound="glorot", stochastic=True)
    w = torch.full((8, 4, 3, 3), -0.5 * bound)
    torch.testing.assert_close(quantizer.eval()(w), torch.full_like(w, -bound))
    assert 0.12 < (quantizer.train()(w) > 0).double().mean() < 0.38
    assert quantizer.project(w * 9).min() == pytest.approx(-bound)
    with pytest.raises(ValueError, match="BinaryConnect: bound must be 'one' or 'glorot', got 'two'"):
        BinaryConnect(spec=weight_spec(2, 2), bound="two")  # type: ignore[arg-type]
