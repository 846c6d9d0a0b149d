"""Affine quantization against torch's own operators, and against equations in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qtrain.functional.affine import asymmetric_scale, code_range, fake_quantize, quantize, symmetric_scale

BITS = st.integers(2, 8)


def tensors(low: int, high: int) -> tuple[Tensor, Tensor]:
    return torch.tensor(float(low)), torch.tensor(float(high))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("bits", "signed", "narrow", "expected"),
    [
        (8, True, False, (-128, 127)),
        (8, True, True, (-127, 127)),
        (8, False, False, (0, 255)),
        (2, True, False, (-2, 1)),
        (2, True, True, (-1, 1)),
        (1, False, False, (0, 1)),
        (16, False, True, (0, 65535)),
    ],
)
def test_code_range(bits: int, signed: bool, narrow: bool, expected: tuple[int, int]) -> None:
    assert code_range(bits, signed=signed, narrow=narrow) == expected


@pytest.mark.parametrize("exponent", [-7, -3, 0, 4])
@pytest.mark.parametrize("zero_point", [0, 3, -8, 7])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_powers_of_two_agree_with_torch_exactly(bits: int, zero_point: int, exponent: int) -> None:
    """With such a scale, division and torch's product with the reciprocal are the same number; ties included."""
    low, high = code_range(bits, signed=True)
    zero_point = max(low, min(high, zero_point))
    scale = 2.0**exponent
    ties = (torch.arange(-600, 600) / 4) * scale  # every quarter step: all ties, and what lies between
    x = torch.cat([noise(2000) * scale * high, ties])
    ours = fake_quantize(x, torch.tensor(scale), *tensors(low, high), torch.tensor(float(zero_point)))
    assert torch.equal(ours, torch.fake_quantize_per_tensor_affine(x, scale, zero_point, low, high))
    codes = quantize(x, torch.tensor(scale), *tensors(low, high), torch.tensor(float(zero_point)))
    assert torch.equal((codes - zero_point) * scale, ours)
    if zero_point == 0:
        assert torch.equal(fake_quantize(x, torch.tensor(scale), *tensors(low, high)), ours)


@pytest.mark.parametrize("scale", [0.1, 0.037, 1.7, 1 / 3])
def test_other_scales_agree_with_torch_except_at_ties(scale: float) -> None:
    low, high = code_range(8, signed=True)
    x = noise(20000, seed=1) * scale * 50
    ours = fake_quantize(x, torch.tensor(scale), *tensors(low, high))
    torchs = torch.fake_quantize_per_tensor_affine(x, scale, 0, low, high)
    steps = x.double() / torch.tensor(scale).double()
    at_tie = (steps - steps.floor() - 0.5).abs() < 1e-5 * steps.abs().clamp(min=1)
    # Where the codes agree the products may still differ in the last place: torch multiplies in the same float32.
    assert torch.equal(ours[~at_tie], torchs[~at_tie])
    assert ((ours - torchs).abs() <= scale * 1.001).all()


def test_per_channel_agrees_with_torch() -> None:
    low, high = code_range(4, signed=True)
    x, scale, zero_point = noise(3, 40), torch.tensor([0.125, 0.5, 0.25]), torch.tensor([0, 2, -3], dtype=torch.int32)
    ours = fake_quantize(x, scale[:, None], *tensors(low, high), zero_point[:, None].float())
    assert torch.equal(ours, torch.fake_quantize_per_channel_affine(x, scale, zero_point, 0, low, high))


def reference(x: Tensor, scale: float, low: int, high: int) -> tuple[Tensor, Tensor, Tensor]:
    """LSQ's equations 1 to 3 (arXiv 1902.08153) in float64: values, d/dx, d/ds of each element."""
    t = x.double() / scale
    inside = (t > low) & (t < high)
    value = t.clamp(low, high).round() * scale
    for_scale = torch.where(inside, t.round() - t, t.clamp(low, high))
    return value, inside.double(), for_scale


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gradients_are_those_of_the_paper(bits: int, signed: bool) -> None:
    low, high = code_range(bits, signed=signed)
    x = (noise(4000, seed=2) * 0.3).requires_grad_()
    scale = torch.tensor(0.3 / high**0.5, requires_grad=True)
    upstream = noise(4000, seed=3)
    value, for_x, for_scale = reference(x.detach(), scale.item(), low, high)
    ours = fake_quantize(x, scale, *tensors(low, high))
    torch.testing.assert_close(ours.double(), value, rtol=1e-6, atol=1e-7)
    grad_x, grad_scale = torch.autograd.grad(ours, [x, scale], upstream)
    torch.testing.assert_close(grad_x.double(), for_x * upstream.double(), rtol=1e-6, atol=1e-7)
    expected = (for_scale * upstream.double()).sum()
    torch.testing.assert_close(grad_scale.double(), expected, rtol=1e-3, atol=1e-3)


def test_gradients_agree_with_torchs_learnable_operator() -> None:
    """Save for the last half step before clipping: torch's operator asks whether the rounded code is in range, LSQ's
    equation whether the value is.
    """
    low, high = code_range(4, signed=True)
    scale, zero = torch.tensor([0.25], requires_grad=True), torch.zeros(1, requires_grad=True)
    x = noise(5000, seed=4)
    steps = x / 0.25
    agree = ((steps >= low) & (steps <= high)) == ((steps.round() >= low) & (steps.round() <= high))
    x = x[agree].requires_grad_()
    theirs = torch._fake_quantize_learnable_per_tensor_affine(x, scale, zero, low, high, 1.0)
    ours = fake_quantize(x, scale, *tensors(low, high))
    assert torch.equal(ours, theirs)
    their_x, their_scale = torch.autograd.grad(theirs.square().sum(), [x, scale])
    our_x, our_scale = torch.autograd.grad(ours.square().sum(), [x, scale])
    assert torch.equal(our_x, their_x)
    assert (our_x == 0).any()
    assert (our_x != 0).any()
    torch.testing.assert_close(our_scale, their_scale, rtol=1e-4, atol=1e-3)


@given(BITS, st.booleans(), st.floats(1e-3, 1e3), st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=20))
def test_error_is_at_most_half_a_step_inside_the_range(
    bits: int, signed: bool, scale: float, values: list[float]
) -> None:
    low, high = code_range(bits, signed=signed)
    x, step = torch.tensor(values), torch.tensor(scale)
    result = fake_quantize(x, step, *tensors(low, high))
    clipped = x.clamp(step * low, step * high)
    assert ((result - clipped).abs() <= step * 0.5 * (1 + 1e-5) + clipped.abs() * 1e-6).all()
    assert torch.equal(fake_quantize(result, step, *tensors(low, high)), result), "twice is as once"


@given(BITS, st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20))
def test_a_range_of_asymmetric_codes_is_covered(bits: int, values: list[float]) -> None:
    """Zero is a code, and every value of the range lies within a step of one."""
    codes = tensors(*code_range(bits, signed=False))
    x = torch.tensor(values)
    scale, zero_point = asymmetric_scale(x.min(), x.max(), *codes)
    assert zero_point == zero_point.round()
    assert codes[0] <= zero_point <= codes[1]
    assert fake_quantize(torch.zeros(1), scale, *codes, zero_point) == 0
    reached = fake_quantize(x, scale, *codes, zero_point)
    assert ((reached - x).abs() <= scale * (1 + 1e-4) + 1e-6).all()


@settings(max_examples=50)
@given(BITS, st.booleans(), st.floats(0, 1e6, width=32), st.floats(0, 1e6, width=32))
def test_the_largest_value_takes_the_highest_code(bits: int, signed: bool, below: float, above: float) -> None:
    codes = tensors(*code_range(bits, signed=signed))
    scale = symmetric_scale(torch.tensor(-below), torch.tensor(above), *codes)
    largest = max(below, above) if signed else above
    if largest < 1e-30:
        assert scale > 0
    else:
        assert quantize(torch.tensor([largest]), scale, *codes).item() == codes[1]


def test_an_empty_range_has_a_scale_of_one() -> None:
    zero = torch.zeros(2)
    codes = tensors(0, 15)
    assert symmetric_scale(zero, zero, *codes).tolist() == [1.0, 1.0]
    scale, zero_point = asymmetric_scale(zero, zero, *codes)
    assert scale.tolist() == [1.0, 1.0]
    assert zero_point.tolist() == [0.0, 0.0]


def test_a_range_too_small_for_a_normal_step_counts_as_empty() -> None:
    """Processors that take subnormal numbers for 0 would divide by 0: 2^-130 is one, 2^-120 / 15 is not."""
    small, normal, codes = torch.tensor(2.0**-130), torch.tensor(2.0**-120), tensors(0, 15)
    zero = torch.zeros(())
    assert symmetric_scale(zero, small, *codes).item() == 1.0
    assert [part.item() for part in asymmetric_scale(zero, small, *codes)] == [1.0, 0.0]
    assert symmetric_scale(zero, normal, *codes).item() == pytest.approx(2.0**-120 / 15)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="quantize: the tensor holds NaN or infinity"):
        quantize(torch.tensor([0.0, bad]), torch.tensor(1.0), *tensors(-8, 7))


def test_half_precision_is_computed_in_float32() -> None:
    x = noise(1000).bfloat16()
    scale = torch.tensor(0.1)
    result = fake_quantize(x, scale, *tensors(-128, 127))
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, fake_quantize(x.float(), scale, *tensors(-128, 127)).bfloat16())


def away_from_ends(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    """Where torch's operators and the papers agree which values are in range.

    torch asks whether the rounded code is, which half a step beyond the last one still is; and it multiplies with the
    reciprocal, which may move a tie.
    """
    steps = x.double() / scale.double() + zero_point.double()
    tie = ((steps - steps.floor()) - 0.5).abs() < 1e-4
    return (((steps < low - 0.6) | (steps > high + 0.6) | ((steps > low) & (steps < high))) & ~tie).reshape(x.shape)


@pytest.mark.parametrize("zero_point", [0, 3, 11])
@pytest.mark.parametrize("scale", [0.125, 0.17])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_per_tensor_gradients_match_torch(bits: int, scale: float, zero_point: int) -> None:
    low, high = code_range(bits, signed=False)
    zero_point = min(zero_point, high)
    step, zero = torch.tensor(scale), torch.tensor(float(zero_point))
    x = noise(4000, seed=5) * scale * high
    x = x[away_from_ends(x, step, zero, low, high)].requires_grad_()
    upstream = noise(len(x), seed=6)
    ours = fake_quantize(x, step, *tensors(low, high), zero)
    theirs = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, low, high)
    assert torch.equal(ours, theirs)
    (our_grad,), (their_grad,) = (torch.autograd.grad(y, x, upstream) for y in (ours, theirs))
    # Ours goes through ``* s / s``, which rounds twice.
    torch.testing.assert_close(our_grad, their_grad, rtol=1e-6, atol=0)
    assert torch.equal(our_grad == 0, their_grad == 0)
    assert 0 < int((our_grad == 0).sum()) < len(x)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [2, 5])
def test_per_channel_values_and_gradients_match_torch(bits: int, axis: int) -> None:
    low, high = code_range(bits, signed=True)
    scale, zero_point = torch.tensor([0.11, 0.5, 0.037]), torch.tensor([0, 1, -2], dtype=torch.int32)
    shape = [1, 1, 1]
    shape[axis] = 3
    step, zero = scale.reshape(shape), zero_point.float().reshape(shape)
    x = noise(3, 3, 2000, seed=7) * step * 2**bits
    x = torch.where(away_from_ends(x, step, zero, low, high), x, 0.0).requires_grad_()
    upstream = noise(3, 3, 2000, seed=8)
    ours = fake_quantize(x, step, *tensors(low, high), zero)
    theirs = torch.fake_quantize_per_channel_affine(x, scale, zero_point, axis, low, high)
    assert torch.equal(ours, theirs)
    (our_grad,), (their_grad,) = (torch.autograd.grad(y, x, upstream) for y in (ours, theirs))
    # Ours goes through ``* s / s``, which rounds twice.
    torch.testing.assert_close(our_grad, their_grad, rtol=1e-6, atol=0)
    assert torch.equal(our_grad == 0, their_grad == 0)
    assert 0 < int((our_grad == 0).sum()) < x.numel()


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("scale", [0.5, 0.13])
def test_learned_step_gradient_matches_torch(bits: int, scale: float) -> None:
    """Per tensor and per channel, with an upstream gradient that differs from value to value."""
    low, high = code_range(bits, signed=True)
    step, zero = torch.tensor([scale, scale * 2], requires_grad=True), torch.zeros(2, requires_grad=True)
    x = noise(2, 3000, seed=9) * scale * high
    x = torch.where(away_from_ends(x, step.detach()[:, None], torch.zeros(1), low, high), x, 0.0).requires_grad_()
    upstream = noise(2, 3000, seed=10)
    theirs = torch._fake_quantize_learnable_per_channel_affine(x, step, zero, 0, low, high, 1.0)
    ours = fake_quantize(x, step[:, None], *tensors(low, high))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    for got, expected in zip(
        torch.autograd.grad(ours, [x, step], upstream), torch.autograd.grad(theirs, [x, step], upstream), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)
    one, nought = torch.tensor([scale], requires_grad=True), torch.zeros(1)
    row = x.detach()[0]
    mine = fake_quantize(row, one, *tensors(low, high))
    torchs = torch._fake_quantize_learnable_per_tensor_affine(row, one, nought, low, high, 1.0)
    (got,), (expected,) = (torch.autograd.grad(y, one, upstream[0]) for y in (mine, torchs))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)


def test_step_gradient_is_the_slope_where_no_code_changes() -> None:
    """Where all is clipped the value is ``Q s``, smooth in ``s``: finite differences give the clipped code."""
    x, scale = torch.tensor([50.0, -60.0, 70.0]), torch.tensor(0.5, requires_grad=True)
    upstream = torch.tensor([1.0, 2.0, 4.0])
    (grad,) = torch.autograd.grad(fake_quantize(x, scale, *tensors(-8, 7)), scale, upstream)
    above, below = (fake_quantize(x, scale.detach() + d, *tensors(-8, 7)) for d in (0.125, -0.125))
    assert grad == ((above - below) / 0.25 * upstream).sum() == 1 * 7 - 2 * 8 + 4 * 7


finite = st.floats(-1e6, 1e6, width=32)


@given(BITS, st.booleans(), st.floats(1e-4, 1e4), st.integers(0, 255), st.lists(finite, min_size=1, max_size=30))
def test_codes_lie_in_range_and_rise_with_the_values(
    bits: int, signed: bool, scale: float, zero: int, values: list[float]
) -> None:
    low, high = code_range(bits, signed=signed)
    x, step, zero_point = torch.tensor(sorted(values)), torch.tensor(scale), torch.tensor(float(min(zero, high)))
    codes = quantize(x, step, *tensors(low, high), zero_point)
    assert codes.dtype == torch.int32
    assert low <= int(codes.min()) <= int(codes.max()) <= high
    assert (codes.diff() >= 0).all()
    result = fake_quantize(x, step, *tensors(low, high), zero_point)
    assert (result.diff() >= 0).all()
    assert torch.equal(result, (codes - zero_point) * step), "forward and storage are one"
    again = quantize(result, step, *tensors(low, high), zero_point)
    assert torch.equal(again, codes), "a quantized value has its own code"


@given(BITS, st.floats(1e-3, 1e3), st.lists(finite, min_size=1, max_size=20))
def test_symmetric_codes_mirror(bits: int, scale: float, values: list[float]) -> None:
    low, high = code_range(bits, signed=True, narrow=True)
    x, step = torch.tensor(values), torch.tensor(scale)
    assert torch.equal(fake_quantize(-x, step, *tensors(low, high)), -fake_quantize(x, step, *tensors(low, high)))


@given(BITS, st.booleans(), st.floats(1e-3, 1e3), st.lists(finite, min_size=1, max_size=20))
def test_quantize_takes_the_nearest_code(bits: int, signed: bool, scale: float, values: list[float]) -> None:
    """Against all codes, in float64."""
    low, high = code_range(bits, signed=signed)
    x, step = torch.tensor(values), torch.tensor(scale)
    away = (fake_quantize(x, step, *tensors(low, high)).double() - x.double()).abs()
    every = torch.arange(low, high + 1).double() * step.double()
    least = (every - x.double()[:, None]).abs().min(dim=1).values
    assert (away <= least * (1 + 1e-5) + x.double().abs() * 1e-6 + scale * 1e-6).all()
