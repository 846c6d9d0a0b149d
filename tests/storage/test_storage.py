"""Stored tensors: bits packed by hand, values decoded by hand, and nothing lost or made up on the way."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qtrain.spec import PerBlock, PerChannel, PerGroup
from qtrain.spec.blocks import Blocks
from qtrain.storage.affine import AffineTensor
from qtrain.storage.base import QTensor, pack, unpack
from qtrain.storage.bits import (
    bits_to_bytes,
    bytes_to_bits,
    float_bits,
    from_float_bits,
    from_integer_bits,
    integer_bits,
)
from qtrain.storage.codebook import CodebookTensor
from qtrain.storage.description import describe, restore
from qtrain.storage.levels import LevelTensor
from qtrain.storage.microexponents import MicroexponentTensor
from qtrain.storage.microscaled import MicroscaledTensor
from qtrain.storage.outliers import OutlierTensor
from qtrain.storage.planes import BitPlanes
from qtrain.storage.vector_scaled import VectorScaledTensor


def test_numbers_stand_most_significant_bit_first_without_gaps() -> None:
    """5, 2, 7 in three bits: 101 010 11|1, and the last byte is filled up with zeros."""
    bits = integer_bits(torch.tensor([5, 2, 7]), 3)
    assert bits.tolist() == [1, 0, 1, 0, 1, 0, 1, 1, 1]
    assert bits_to_bytes(bits) == bytes([0b10101011, 0b10000000])
    assert integer_bits(torch.tensor([-2, 1]), 2, low=-2).tolist() == [0, 0, 1, 1]


@given(st.integers(1, 40), st.integers(-(2**20), 2**20), st.data())
def test_integers_come_back(bits: int, low: int, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.integers(low, low + 2**bits - 1), max_size=20))
    stream = integer_bits(torch.tensor(values, dtype=torch.int64), bits, low)
    assert stream.numel() == len(values) * bits
    assert from_integer_bits(stream, bits, low).tolist() == values


@pytest.mark.parametrize("value", [-3, 5])
def test_integers_that_do_not_fit_are_refused(value: int) -> None:
    with pytest.raises(ValueError, match=r"integer_bits: values must lie in -2\.\.1 to fit 2 bits"):
        integer_bits(torch.tensor([0, value]), 2, low=-2)


@pytest.mark.parametrize(("dtype", "code"), [(torch.float64, ">d"), (torch.float32, ">f"), (torch.float16, ">e")])
@given(st.lists(st.floats(width=16, allow_nan=False), max_size=10))
def test_floats_are_their_ieee_patterns(dtype: torch.dtype, code: str, values: list[float]) -> None:
    tensor = torch.tensor(values, dtype=dtype)
    data = bits_to_bytes(float_bits(tensor))
    width = struct.calcsize(code)
    for i, value in enumerate(tensor.tolist()):
        assert data[i * width : (i + 1) * width] == struct.pack(code, value)
    assert torch.equal(from_float_bits(bytes_to_bits(data), dtype), tensor)


def test_bfloat16_comes_back_with_its_special_values() -> None:
    tensor = torch.tensor([0.0, -0.0, 1.5, float("inf"), -3e38, 1e-40]).bfloat16()
    back = from_float_bits(float_bits(tensor), torch.bfloat16)
    assert torch.equal(back.view(torch.int16), tensor.view(torch.int16))


def codes(*values: Any, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


AFFINE = AffineTensor(
    codes=codes([0, 1, 3], [3, 2, 0]), bits=2, low=0, high=3, scale=torch.tensor([[0.5], [2.0]]),
    zero_point=codes([1], [0]), offset=torch.tensor([[0.0], [1.0]]), granularity=PerChannel(0),
)  # fmt: skip
CODEBOOK = CodebookTensor(
    codes=codes([2, 0, 1, 1], [0, 3, 2, 0]), bits=2, low=0, high=3, granularity=PerBlock(4),
    codebook=torch.tensor([[[-1.0, 0.25, 3.0, 9.0]], [[1.0, 2.0, 4.0, 8.0]]]),
)  # fmt: skip
LEVELS = LevelTensor(
    codes=codes([1, 0], [2, 2]), bits=2, low=0, high=2, levels=torch.tensor([-1.0, 0.0, 0.5]),
    scale=torch.tensor([[3.0]]), granularity=PerGroup(2),
)  # fmt: skip
PLANES = BitPlanes(
    codes=codes([[1, 0, 1]], [[0, 0, 1]]), bits=2, low=0, high=1, scale=torch.tensor([1.0, 0.25]),
)  # fmt: skip
MICROSCALED = MicroscaledTensor(
    codes=codes([7, 9, 0]), bits=4, low=0, high=15, exponent=codes([128, 126]), element="e2m1", blocks=Blocks(2),
)  # fmt: skip
MICROEXPONENT = MicroexponentTensor(
    codes=codes([3, -1, 2]), bits=4, low=-3, high=3, exponent=codes([128]), shift=codes([0, 1]),
    blocks=Blocks(16), pairs=Blocks(2),
)  # fmt: skip
VECTOR = VectorScaledTensor(
    codes=codes([3, -1, 2]), bits=3, low=-3, high=3, fine=codes([1, 5]), fine_bits=4, coarse=torch.tensor([[0.5]]),
    blocks=Blocks(2),
)  # fmt: skip
OUTLIER = OutlierTensor(
    codes=AFFINE.codes, bits=2, low=0, high=3, decoder=replace(AFFINE, codes=AFFINE.codes[:0]),
    positions=codes(1, 5), position_bits=3, outliers=torch.tensor([100.0, -7.5], dtype=torch.float16),
)  # fmt: skip

MANUAL: dict[str, tuple[QTensor, list[Any], int, int]] = {
    # (0 - 1) / 2 ..., 3 * 2 + 1 ...; 6 codes, 2 zero points, 2 scales, 2 offsets
    "affine": (AFFINE, [[-0.5, 0.0, 1.0], [7.0, 5.0, 1.0]], 6 * 2, 2 * 2 + 4 * 32),
    "codebook": (CODEBOOK, [[3.0, -1.0, 0.25, 0.25], [1.0, 8.0, 4.0, 1.0]], 8 * 2, 8 * 32),
    "levels": (LEVELS, [[0.0, -3.0], [1.5, 1.5]], 4 * 2, 32),
    "planes": (PLANES, [[0.75, -1.25, 1.25]], 6, 2 * 32),
    # 6 * 2, -0.5 * 2, 0 / 2
    "microscaled": (MICROSCALED, [[12.0, -1.0, 0.0]], 3 * 4, 2 * 8),
    # the step is 2^(1 + 1 - 2) = 1, of the second pair a half
    "microexponent": (MICROEXPONENT, [[3.0, -1.0, 1.0]], 3 * 3, 8 + 2),
    "vector": (VECTOR, [[1.5, -0.5, 5.0]], 3 * 3, 2 * 4 + 32),
    # as affine, but for the second and the sixth value; places and values belong to the codes
    "outlier": (OUTLIER, [[-0.5, 100.0, 1.0], [7.0, 5.0, -7.5]], 6 * 2 + 2 * (3 + 16), 2 * 2 + 4 * 32),
}

each_kind = pytest.mark.parametrize("name", MANUAL)


@each_kind
def test_values_and_sizes_by_hand(name: str) -> None:
    stored, values, code_bits, decoding = MANUAL[name]
    assert stored.dequantize().tolist() == values
    assert (stored.code_bits, stored.nbits - stored.code_bits) == (code_bits, decoding)
    assert stored.write().numel() == stored.nbits
    assert len(pack(stored)) == -(-stored.nbits // 8)


@each_kind
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_have_the_type_that_was_asked_for(name: str, dtype: torch.dtype) -> None:
    stored = replace(MANUAL[name][0], dtype=dtype)
    if isinstance(stored, OutlierTensor):
        stored = replace(stored, decoder=replace(stored.decoder, dtype=dtype))
    assert stored.dequantize().dtype == dtype


def blank(stored: QTensor) -> QTensor:
    """``stored`` without a single value that its parts hold, only shapes and types."""
    found: dict[str, Any] = {}
    for name in stored.parts():
        value = getattr(stored, name)
        found[name] = blank(value) if isinstance(value, QTensor) else torch.zeros_like(value)
    found["codes"] = torch.full_like(stored.codes, stored.low)
    return replace(stored, **found)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, QTensor):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return bool(a == b)


@each_kind
def test_every_kind_round_trips_through_bytes(name: str) -> None:
    stored = MANUAL[name][0]
    assert not same(blank(stored), stored)
    assert same(unpack(pack(stored), like=blank(stored)), stored)


@each_kind
def test_description_and_bytes_give_the_tensor_again(name: str) -> None:
    """As a file does it; nothing of what comes back is without memory, empty codes neither."""
    stored = MANUAL[name][0]
    like = restore(json.loads(json.dumps(describe(stored))))
    assert same(unpack(pack(stored), like=like), stored)


@each_kind
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: data[:-1], r"unpack: \d+ bytes are too few for this tensor; is the file cut off\?"),
        (lambda data: b"", "unpack: 0 bytes are too few for this tensor"),
        (lambda data: data + b"\x00", r"unpack: \d+ of \d+ bits are left over; the shapes are another tensor's"),
        (lambda data: data + data, r"unpack: \d+ of \d+ bits are left over"),
    ],
    ids=["cut", "empty", "surplus", "twice"],
)
def test_unpack_refuses_wrong_length(name: str, spoil: Callable[[bytes], bytes], message: str) -> None:
    stored = MANUAL[name][0]
    with pytest.raises(ValueError, match=message) as caught:
        unpack(spoil(pack(stored)), like=stored)
    assert "\n" not in str(caught.value)


def test_unpack_refuses_set_bits_in_the_padding() -> None:
    stored = replace(LEVELS, codes=LEVELS.codes[:1], bits=3)
    data = bytearray(pack(stored))
    assert len(data) == 5  # 6 bits of codes, 32 of a scale, 2 to fill
    data[-1] |= 1
    with pytest.raises(ValueError, match="unpack: 2 of 40 bits are left over"):
        unpack(bytes(data), like=stored)


@given(
    st.integers(1, 8),
    st.integers(-130, 5),
    st.lists(st.integers(1, 3), max_size=3),
    st.floats(2.0**-20, 2.0**20, width=32),
    st.booleans(),
    st.data(),
)
def test_affine_tensors_of_any_shape_come_back(
    bits: int, low: int, shape: list[int], scale: float, huffman: bool, data: st.DataObject
) -> None:
    count = torch.Size(shape).numel()
    drawn = data.draw(st.lists(st.integers(low, low + 2**bits - 1), min_size=count, max_size=count))
    stored = AffineTensor(
        codes=torch.tensor(drawn, dtype=torch.int32).reshape(shape),
        bits=bits,
        low=low,
        high=low + 2**bits - 1,
        scale=torch.tensor(scale),
        huffman=huffman,
    )
    assert same(unpack(pack(stored), like=blank(stored)), stored)
    assert torch.equal(stored.dequantize(), stored.codes.float() * scale)
    assert huffman or stored.nbits == count * bits + 32


@pytest.mark.parametrize(
    ("tensor", "change"),
    [
        (AFFINE, {"scale": torch.ones(2, 1000)}),
        (AFFINE, {"zero_point": codes([1])}),
        (AFFINE, {"offset": torch.ones(())}),
        (CODEBOOK, {"codebook": torch.ones(1, 1, 4)}),
        (LEVELS, {"scale": torch.ones(2, 1)}),
        (PLANES, {"scale": torch.ones(2, 1000, 1)}),
        (MICROSCALED, {"exponent": codes([128])}),
        (MICROEXPONENT, {"shift": codes([0])}),
        (VECTOR, {"fine": codes([1])}),
        (OUTLIER, {"decoder": replace(OUTLIER.decoder, scale=torch.ones(1, 1))}),
    ],
)
def test_what_decodes_another_shape_is_refused(tensor: QTensor, change: dict[str, Any]) -> None:
    """Else both would broadcast against each other, to a tensor that is far larger than what is stored."""
    with pytest.raises(ValueError, match=r"a tensor of shape .* needs a state of shape .* to decode it, not"):
        replace(tensor, **change).dequantize()


def test_coarse_scale_that_would_enlarge_the_fine_ones_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"expand"):
        replace(VECTOR, coarse=torch.ones(1000, 1, 1)).dequantize()


@pytest.mark.parametrize("bits", [0, -1, 33, 2.0, True, None])
def test_impossible_widths_are_refused(bits: Any) -> None:
    with pytest.raises(ValueError, match=r"AffineTensor: needs codes of 1 to 32 bits, got"):
        replace(AFFINE, bits=bits)


@pytest.mark.parametrize("bits", [65, -1, 10**9])
def test_numbers_wider_than_a_machine_has_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=rf"a number of {bits} bits cannot be stored; 1 to 64 are possible"):
        from_integer_bits(torch.zeros(8, dtype=torch.uint8), bits)


def test_empty_tensor_takes_no_codes() -> None:
    empty = replace(AFFINE, codes=torch.zeros(2, 0, dtype=torch.int32))
    assert (empty.code_bits, empty.dequantize().shape) == (0, (2, 0))
    assert same(unpack(pack(empty), like=blank(empty)), empty)


def test_operands_are_codes_or_floats_from_a_table() -> None:
    bits = {name: stored.operand_bits for name, (stored, *_) in MANUAL.items()}
    assert bits.pop("codebook") == 32
    assert all(bits[name] == MANUAL[name][0].bits for name in bits)
