"""OCP MX: element formats against the specification's tables and torch's casts, blocks against a loop over them."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qtrain.functional.powers import power_below
from qtrain.quantizers.block.ocp_mx import OcpMx, round_to_element
from qtrain.spec import QuantSpec
from qtrain.spec.blocks import Blocks
from qtrain.storage.elements import ELEMENTS
from qtrain.storage.microscaled import MicroscaledTensor

FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
EMAX = {"e2m1": 2, "e2m3": 2, "e3m2": 4, "e4m3": 8, "e5m2": 15, "int8": 0}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rounded(t: Tensor, name: str) -> Tensor:
    element = ELEMENTS[name]
    figures = 2.0**element.smallest_exponent, 2.0**element.mantissa_bits, element.largest
    return round_to_element(t, *(torch.tensor(figure) for figure in figures))


def quantizer(name: str, *shape: int, axis: int = 1) -> OcpMx:
    spec = QuantSpec(bits=ELEMENTS[name].bits, shape=shape, signed=True if shape else None, channel_axis=axis)
    return OcpMx(spec=spec, element=name)


@pytest.mark.parametrize(
    ("name", "largest", "smallest_normal", "largest_subnormal", "smallest", "count"),
    [
        ("e4m3", 448.0, 2**-6, 0.875 * 2**-6, 2**-9, 127),  # table 1; one of 128 codes is NaN
        ("e5m2", 57344.0, 2**-14, 0.75 * 2**-14, 2**-16, 124),  # infinity and three NaN
        ("e3m2", 28.0, 0.25, 0.1875, 0.0625, 32),  # table 2
        ("e2m3", 7.5, 1.0, 0.875, 0.125, 32),
        ("e2m1", 6.0, 1.0, 0.5, 0.5, 8),  # table 3
        ("int8", 1 + 63 / 64, 1.0, 63 / 64, 1 / 64, 128),  # table 4; of whole numbers 1 is no boundary
    ],
)
def test_element_formats_match_the_specification(
    name: str, largest: float, smallest_normal: float, largest_subnormal: float, smallest: float, count: int
) -> None:
    values = ELEMENTS[name].magnitudes().tolist()
    assert values == sorted(set(values))
    assert (values[0], values[1], values[-1], len(values)) == (0.0, smallest, largest, count)
    assert values[values.index(smallest_normal) - 1] == largest_subnormal
    assert math.floor(math.log2(largest)) == EMAX[name] == ELEMENTS[name].largest_exponent


def test_fp4_matches_all_values_of_the_specification() -> None:
    table = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert ELEMENTS["e2m1"].decode(torch.arange(16)).tolist() == [*table, *(-value for value in table)]


@pytest.mark.parametrize("name", FLOAT8)
def test_codes_are_the_bit_patterns_that_torch_has(name: str) -> None:
    patterns = torch.arange(256, dtype=torch.uint8)
    values = patterns.view(FLOAT8[name]).float()
    finite = values.isfinite()
    codes = patterns[finite].to(torch.int32)
    assert torch.equal(ELEMENTS[name].decode(codes), values[finite])
    assert torch.equal(ELEMENTS[name].encode(values[finite]), codes), "minus zero included"


@pytest.mark.parametrize("name", ELEMENTS)
def test_decoding_undoes_encoding(name: str) -> None:
    element = ELEMENTS[name]
    values = torch.cat([element.magnitudes(), -element.magnitudes()])
    codes = element.encode(values)
    assert int(codes.min()) >= 0
    assert int(codes.max()) < 2**element.bits
    assert torch.equal(element.decode(codes), values)


@pytest.mark.parametrize("name", FLOAT8)
def test_rounding_is_torchs_cast(name: str) -> None:
    """Every float16 in the format's range, so every tie and every subnormal."""
    x = torch.arange(2**15, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    x = x[x <= ELEMENTS[name].largest]
    for t in (x, -x, x * 1.0001):
        t = t.clamp(-ELEMENTS[name].largest, ELEMENTS[name].largest)
        assert torch.equal(rounded(t, name), t.to(FLOAT8[name]).float())


@pytest.mark.parametrize("name", ELEMENTS)
@settings(max_examples=60)
@given(st.floats(-1.2, 1.2), st.integers(-6, 0))
def test_rounding_takes_the_nearest_of_the_table(name: str, share: float, exponent: int) -> None:
    """By exact fractions; of two that are as near the one with an even code; beyond the largest the largest."""
    table = ELEMENTS[name].magnitudes().tolist()
    t = torch.tensor([share * table[-1] * 2.0**exponent])
    away = [abs(Fraction(abs(float(t))) - Fraction(value)) for value in table]
    nearest = min(range(len(table)), key=lambda code: (away[code], code % 2))
    assert abs(float(rounded(t, name))) == table[nearest]
    assert float(rounded(t, name)) * share >= 0


@pytest.mark.parametrize("name", ELEMENTS)
def test_midpoints_go_to_the_even_code(name: str) -> None:
    table = ELEMENTS[name].magnitudes()
    even = torch.arange(len(table) - 1)
    even += even % 2
    assert torch.equal(rounded((table[:-1] + table[1:]) / 2, name), table[even])


def blockwise(x: Tensor, name: str, axis: int) -> Tensor:
    """The specification's section 6.3 in Python's floats, one block after the other."""
    table = ELEMENTS[name].magnitudes().tolist()
    vectors = x.movedim(axis, -1)
    result = torch.empty(vectors.shape)
    for place in range(vectors[..., 0].numel()):
        vector = vectors.reshape(-1, vectors.shape[-1])[place].tolist()
        values: list[float] = []
        for begin in range(0, len(vector), 32):
            block = vector[begin : begin + 32]
            scale = 2.0 ** (math.floor(math.log2(max(map(abs, block)))) - EMAX[name])
            for value in block:
                nearest = min(range(len(table)), key=lambda code: (abs(abs(value) / scale - table[code]), code % 2))
                values.append(math.copysign(table[nearest] * scale, value))
        result.view(-1, vectors.shape[-1])[place] = torch.tensor(values)
    return result.movedim(-1, axis)


@pytest.mark.parametrize(("shape", "axis"), [((2, 40, 2, 1), 1), ((3, 2, 70), -1), ((2, 32), 1), ((5,), 1)])
@pytest.mark.parametrize("name", ELEMENTS)
def test_blocks_against_a_loop_over_them(name: str, shape: tuple[int, ...], axis: int) -> None:
    x = noise(*shape) * torch.exp(3 * noise(*shape, seed=1))
    expected = blockwise(x, name, axis if len(shape) > 1 else 0)
    assert torch.equal(quantizer(name, *shape, axis=axis)(x), expected)
    assert torch.equal(quantizer(name, axis=axis)(x), expected), "of an input, whose shape is not known ahead"


def test_sizes_by_hand() -> None:
    """40 input channels are two blocks, 32 and 8: 3 * 5 * 2 scales of 8 bits, and no code for what is not there."""
    weight = quantizer("e2m1", 3, 40, 5)
    stored = weight.quantize(noise(3, 40, 5))
    assert stored.nbits == 3 * 40 * 5 * 4 + 3 * 2 * 5 * 8
    assert weight.storage_bits() == 3 * 2 * 5 * 8
    assert quantizer("e2m1").storage_bits() == 0
    full = quantizer("e2m3", 8, 64).quantize(noise(8, 64))
    assert full.nbits / (8 * 64) == 6.25


def test_the_stored_scale_is_e8m0() -> None:
    x = torch.tensor([[6.0, -1.0, 0.3]])  # floor(log2 6) = 2 = emax, so X = 1 and E8M0 holds 127
    stored = quantizer("e2m1", 1, 3).quantize(x)
    assert isinstance(stored, MicroscaledTensor)
    assert stored.exponent.tolist() == [[127]]
    assert stored.codes.tolist() == [[7, 8 + 2, 1]]
    assert stored.dequantize().tolist() == [[6.0, -1.0, 0.5]]


@pytest.mark.parametrize("name", ELEMENTS)
def test_the_gradient_passes_everywhere(name: str) -> None:
    x = (noise(4, 40) * 10).requires_grad_()
    upstream = noise(4, 40, seed=1)
    (grad,) = torch.autograd.grad(quantizer(name, 4, 40)(x), x, upstream)
    assert torch.equal(grad, upstream)


def test_auto_follows_the_bits() -> None:
    x = noise(2, 32)
    auto = OcpMx(spec=QuantSpec(bits=4))
    for bits, name in ((6, "e2m3"), (8, "e4m3"), (4, "e2m1")):
        auto.set_range_(bits=bits, signed=True)
        assert torch.equal(auto(x), quantizer(name)(x))


def test_zeros_and_extremes_keep_their_value() -> None:
    for value in (0.0, 2.0**-126, 2.0**127, -(2.0**100)):
        x = torch.full((2, 33), value)
        assert torch.equal(quantizer("e4m3")(x), x)


def test_nan_and_infinity_make_their_block_nan() -> None:
    x = torch.ones(1, 64)
    x[0, 3] = float("inf")
    result = quantizer("e4m3")(x)
    assert result[0, 3].isnan()
    assert torch.equal(result[0, 32:], x[0, 32:])


@pytest.mark.parametrize(
    ("bits", "element", "message"),
    [
        (5, "auto", "OcpMx: bits must be 4 or 6 or 8 for element 'auto', got 5"),
        (8, "e2m1", "OcpMx: bits must be 4 for element 'e2m1', got 8; or name another"),
        (8, "e3m4", r"OcpMx: element must be 'auto' or one of \['e2m1', .*\], got 'e3m4'"),
    ],
)
def test_wrong_options_are_refused(bits: int, element: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OcpMx(spec=QuantSpec(bits=bits), element=element)
    with pytest.raises(ValueError, match="OcpMx: bits must be 8, got 4"):
        quantizer("e5m2").set_range_(bits=4, signed=True)


@given(st.floats(0, width=32, allow_nan=False, allow_infinity=False))
def test_power_below(value: float) -> None:
    mantissa, exponent = math.frexp(value)
    power = float(power_below(torch.tensor(value)))
    assert power == (2.0 ** (exponent - 1) if value >= 2.0**-126 and mantissa else 0.0)


def test_blocks_of_odd_shapes() -> None:
    blocks = Blocks(size=2)
    x = torch.tensor([[1.0, 2, 3], [6, 5, 4]])
    assert blocks.state_shape((2, 3)) == (2, 2)
    assert blocks.largest(x).tolist() == [[2.0, 3.0], [6.0, 4.0]]
    assert blocks.spread(blocks.largest(x), (2, 3)).tolist() == [[2.0, 2.0, 3.0], [6.0, 6.0, 4.0]]
    for shape, states in (((0, 3), (0, 2)), ((3, 0), (3, 0)), ((), ()), ((5,), (3,))):
        empty = torch.ones(shape)
        assert blocks.largest(empty).shape == blocks.state_shape(shape) == states
        assert blocks.spread(torch.ones(states), shape).shape == shape
    with pytest.raises(ValueError, match="Blocks: size must be at least 1, got 0"):
        Blocks(size=0)
