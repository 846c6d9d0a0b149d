"""Shared microexponents: a block by hand, a loop over blocks in Python's floats, sizes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qtrain.quantizers.block.mx import MX
from qtrain.spec import QuantSpec
from qtrain.storage.microexponents import MicroexponentTensor


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantizer(bits: int, *shape: int, axis: int = 1) -> MX:
    return MX(spec=QuantSpec(bits=bits, shape=shape, signed=True if shape else None, channel_axis=axis))


def test_mx4_by_hand() -> None:
    """E = 2 of 7.0; pairs (7, 0.4) and (2.5, -4) keep it, the step is 2; (1.4, 3) moves down, the step is 1."""
    stored = quantizer(4).quantize(torch.tensor([[7.0, 0.4, 2.5, -4.0, 1.4, 3.0, 0.2]]))
    assert isinstance(stored, MicroexponentTensor)
    assert stored.exponent.tolist() == [[127 + 2]]
    assert stored.shift.tolist() == [[0, 0, 1, 1]]
    assert stored.codes.tolist() == [[3, 0, 1, -2, 1, 3, 0]], "7 would be 4 steps, one more than two bits hold"
    assert stored.dequantize().tolist() == [[6.0, 0.0, 2.0, -4.0, 1.0, 3.0, 0.0]]
    assert stored.nbits == 7 * 3 + 8 + 4


@pytest.mark.parametrize(("bits", "mantissa"), [(4, 2), (6, 4), (9, 7)])
def test_a_full_block_takes_the_nominal_bits(bits: int, mantissa: int) -> None:
    """Table 1 of the paper: MX4, MX6, MX9 have 2, 4, 7 mantissa bits; k1 = 16, k2 = 2, d1 = 8, d2 = 1."""
    weight = quantizer(bits, 4, 32)
    stored = weight.quantize(noise(4, 32))
    assert (stored.low, stored.high) == (-(2**mantissa) + 1, 2**mantissa - 1)
    assert stored.nbits == 4 * 32 * bits
    assert stored.code_bits == 4 * 32 * (1 + mantissa)
    assert weight.storage_bits() == 4 * (2 * 8 + 16 * 1)
    assert quantizer(bits).storage_bits() == 0


def blockwise(vector: list[float], mantissa: int) -> list[float]:
    result = []
    exponent_of = [math.frexp(value)[1] - 1 if value else -1000 for value in vector]
    for i, value in enumerate(vector):
        block, pair = i - i % 16, i - i % 2
        shared = max(exponent_of[block : block + 16])
        shift = min(1, shared - max(exponent_of[pair : pair + 2]))
        step = 2.0 ** (shared - shift - mantissa + 1)
        result.append(max(-(2**mantissa) + 1, min(2**mantissa - 1, round(value / step))) * step)
    return result


@pytest.mark.parametrize("bits", MX.widths)
@pytest.mark.parametrize("length", [1, 15, 16, 39])
def test_blocks_against_a_loop_over_them(bits: int, length: int) -> None:
    x = noise(3, length) * torch.exp(noise(3, length, seed=1))
    expected = torch.tensor([blockwise(row, bits - 2) for row in x.tolist()])
    assert torch.equal(quantizer(bits)(x), expected)
    assert torch.equal(quantizer(bits, axis=-1)(x[:, None]), expected[:, None])
    maps = x[:, :, None, None].expand(-1, -1, 2, 3)
    assert torch.equal(quantizer(bits, *maps.shape)(maps), expected[:, :, None, None].expand_as(maps))


@given(st.lists(st.floats(-(2.0**60), 2.0**60, width=32), min_size=1, max_size=20), st.sampled_from([4, 6, 9]))
def test_error_is_at_most_half_a_step_below_the_top_code(values: list[float], bits: int) -> None:
    x = torch.tensor([values])
    stored = quantizer(bits).quantize(x)
    assert isinstance(stored, MicroexponentTensor)
    step = 2.0 ** (stored.exponent.double() - 127 + 3 - bits)
    off = (stored.dequantize().double() - x.double()).abs()
    bound = torch.where(stored.codes.abs() == stored.high, 1.0, 0.5) * stored.blocks.spread(step, tuple(x.shape))
    assert (off <= bound).all()


def test_the_gradient_passes_everywhere() -> None:
    x, upstream = noise(4, 40).requires_grad_(), noise(4, 40, seed=1)
    (grad,) = torch.autograd.grad(quantizer(4, 4, 40)(x), x, upstream)
    assert torch.equal(grad, upstream)


@pytest.mark.parametrize("bits", [2, 10])
def test_bits_without_a_format_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=rf"MX: bits must be 3\.\.9, got {bits}"):
        quantizer(bits)
