"""SQuant against all ways to round: each pass meets its constraint, and at the least cost."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from qtrain.nn import QuantConv, QuantLinear, QuantWeighted
from qtrain.observers.min_max import MinMax
from qtrain.ptq.rounding.squant import SQuant, cancel
from qtrain.quantizers.uniform.affine import Affine
from qtrain.spec import PerBlock, PerChannel, PerTensor, QuantSpec

STEP = 1 / 64
"""Perturbations are whole 64ths, so that sums are exact and no two ways differ by rounding of floats."""

perturbations = st.integers(-31, 31).map(lambda n: n * STEP)


def kernels(size: int, most: int = 4) -> st.SearchStrategy[list[list[float]]]:
    kernel = st.lists(perturbations, min_size=size, max_size=size)
    return st.lists(kernel, min_size=1, max_size=most)


def all_free(perturbation: Tensor) -> Tensor:
    return torch.ones_like(perturbation, dtype=torch.bool)


def all_ways(perturbation: Tensor) -> tuple[Tensor, Tensor]:
    """All ways to round elements (n,) to either side, (2^n, n), and how many of each are on the other side.

    An element that is a code itself counts as rounded up.
    """
    flips = torch.tensor(list(itertools.product([0.0, 1.0], repeat=len(perturbation))))
    return perturbation - flips * torch.where(perturbation > 0, 1.0, -1.0), flips.sum(dim=1)


def least_square(ways: Tensor, allowed: Tensor) -> Tensor:
    return ways[allowed].square().sum(dim=1).min()


@given(st.lists(perturbations, min_size=1, max_size=7))
def test_a_kernel_alone_is_rounded_within_a_half_at_the_least_squared_error(values: list[float]) -> None:
    """One kernel is its channel too. Among all 2^n ways that keep the sum within a half none has a smaller error."""
    before = torch.tensor(values)
    after = cancel(before.reshape(1, 1, -1), all_free(before).reshape(1, 1, -1)).reshape(-1)
    ways, _ = all_ways(before)
    assert (ways == after).all(dim=1).any(), "each element is rounded up or down"
    assert after.sum().abs() <= 0.5
    assert after.square().sum() == least_square(ways, ways.sum(dim=1).abs() <= 0.5)


@given(kernels(3))
def test_a_channel_ends_within_a_half_and_moves_the_kernels_with_the_largest_sums(values: list[list[float]]) -> None:
    before = torch.tensor(values)
    after = cancel(before.unsqueeze(0), all_free(before).unsqueeze(0)).squeeze(0)
    assert after.sum().abs() <= 0.5
    assert (after.abs() < 1).all()

    # Pass K alone: each kernel as a channel of its own.
    alone = cancel(before.unsqueeze(1), all_free(before).unsqueeze(1)).squeeze(1)
    assert (alone.sum(dim=1).abs() <= 0.5).all()
    sums, moved = alone.sum(dim=1), after.sum(dim=1)
    assert (((moved - sums).abs() == 0) | ((moved - sums).abs() == 1)).all(), "one element of a kernel at most"
    assert (moved.abs() < 1).all()

    # Among all ways to move some kernels' sums by one toward the other side, none leaves smaller sums.
    ways, _ = all_ways(sums)
    assert moved.square().sum() == least_square(ways, ways.sum(dim=1).abs() <= 0.5)

    # And each of those kernels is moved by the one flip that costs least, forth or back.
    for kernel, final, start, end in zip(alone, after, sums, moved, strict=True):
        ways, flips = all_ways(kernel)
        expected = kernel.square().sum()
        if start != end:
            expected = least_square(ways, (flips == 1) & (ways.sum(dim=1) == end))
        assert final.square().sum() == expected


def test_pass_c_flips_back_an_element_that_pass_k_flipped() -> None:
    """K takes 0.4 + 0.3 - 0.1 = 0.6 to -0.4 by the first element; with the other kernel's -0.3 C undoes that."""
    before = torch.tensor([[[0.4, 0.3, -0.1], [-0.1, -0.1, -0.1]]])
    after = cancel(before, all_free(before))
    torch.testing.assert_close(after, torch.tensor([[[0.4, 0.3, -0.1], [-0.1, -0.1, -0.1]]]))
    assert after.sum().abs() <= 0.5


def test_elements_that_are_not_free_do_not_change() -> None:
    before = torch.tensor([[[0.4, 0.3, 0.2]]])
    after = cancel(before, torch.tensor([[[False, False, True]]]))
    torch.testing.assert_close(after, torch.tensor([[[0.4, 0.3, -0.8]]]))
    assert torch.equal(cancel(before, torch.zeros_like(before, dtype=torch.bool)), before)


def calibrated(layer: QuantWeighted, quantizer: Any) -> QuantWeighted:
    weight = layer.effective_weight().detach()
    made = quantizer(spec=QuantSpec(bits=4, shape=tuple(weight.shape), signed=True))
    observer = MinMax(granularity=made.granularity)
    observer.update(weight)
    made.calibrate_(observer.observed(4)._replace(tensor=weight))
    layer.weight_quantizer = made
    return layer


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerBlock(4)], ids=str)
@pytest.mark.parametrize("kind", ["conv", "depthwise", "linear"])
def test_squant_bounds_error_sums_of_a_layer_in_steps(kind: str, granularity: Any) -> None:
    """Seen from outside: codes less weights in steps, over kernels, and over channels as far as steps are equal."""
    torch.manual_seed(0)
    if kind == "depthwise" and granularity == PerBlock(4):
        pytest.skip("a depthwise layer has one input for each output")
    layer: QuantWeighted
    if kind == "linear":
        layer = QuantLinear(source=nn.Linear(40, 16))
    else:
        layer = QuantConv(source=nn.Conv2d(8, 8, 3, groups=8 if kind == "depthwise" else 1))
    layer = calibrated(layer, partial(Affine, granularity=granularity))
    quantizer = layer.weight_quantizer
    assert quantizer is not None
    weight = layer.effective_weight().detach().clone()
    scale = quantizer.spread(quantizer.scale, weight)
    blocks = weight.shape[1] // 4 if granularity == PerBlock(4) else 1

    def off(codes: Tensor) -> Tensor:
        return (codes - weight / scale).reshape(weight.shape[0] * blocks, weight.shape[1] // blocks, -1)

    nearest = off(quantizer.quantize(weight).codes)
    SQuant()(nn.Sequential(layer), [], seed=0)
    after = off(quantizer.quantize(layer.effective_weight()).codes)
    assert after.abs().max() < 1 + 1e-5
    assert after.sum(dim=2).abs().max() < 1 + 1e-5
    assert after.sum(dim=(1, 2)).abs().max() <= 0.5 + 1e-4
    assert nearest.sum(dim=(1, 2)).abs().max() > 0.5, "nearest rounding does not do that by itself"
    settled = layer.weight.detach().clone()
    SQuant()(nn.Sequential(layer), [], seed=0)
    assert torch.equal(layer.weight, settled), "what is on the grid stays"


def test_clipped_weights_stay_clipped_and_steps_along_a_kernel_stay_at_nearest(
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.manual_seed(0)
    layer = calibrated(QuantConv(source=nn.Conv2d(4, 4, 3)), Affine)
    assert layer.weight_quantizer is not None
    layer.weight_quantizer.scale.mul_(0.3)
    weight = layer.effective_weight().detach().clone()
    before = layer.weight_quantizer.quantize(weight).codes
    steps = weight / layer.weight_quantizer.scale
    clipped = (steps < -8) | (steps > 7)
    SQuant()(nn.Sequential(layer), [], seed=0)
    after = layer.weight_quantizer.quantize(layer.effective_weight()).codes
    assert clipped.any()
    assert torch.equal(after[clipped], before[clipped])
    assert (after != before).any()

    other = calibrated(QuantConv(source=nn.Conv2d(4, 4, 3)), partial(Affine, granularity=PerChannel(-1)))
    assert other.weight_quantizer is not None
    nearest = other.weight_quantizer(other.effective_weight().detach())
    SQuant()(nn.Sequential(other), [], seed=0)
    assert torch.equal(other.effective_weight(), nearest)
    assert "its steps differ within a kernel" in caplog.text
