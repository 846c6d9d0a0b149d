"""Relative indices: by hand, for any places and widths, and the size of a sparse tensor to the byte."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qtrain.spec import PerChannel
from qtrain.storage.affine import AffineTensor
from qtrain.storage.base import pack, unpack
from qtrain.storage.huffman import code_lengths
from qtrain.storage.sparse import SparseTensor, gaps_of, places_of


def kept_at(places: list[int], count: int) -> Tensor:
    kept = torch.zeros(count, dtype=torch.bool)
    kept[places] = True
    return kept


def test_gaps_by_hand() -> None:
    """Places 1, 4 and 15, as in Deep Compression's metric 2; in 3 bits the gap of 10 is 7 passed over and 3."""
    kept = kept_at([1, 4, 15], 20)
    assert gaps_of(kept, 3).tolist() == [1, 2, 7, 3]
    assert gaps_of(kept, 8).tolist() == [1, 2, 10]
    assert gaps_of(kept_at([7], 8), 3).tolist() == [7, 0], "the highest number never stands for a place"
    assert gaps_of(kept_at([], 8), 3).tolist() == []


@given(st.lists(st.booleans(), max_size=60), st.integers(1, 6))
def test_places_invert_gaps(values: list[bool], bits: int) -> None:
    kept = torch.tensor(values, dtype=torch.bool)
    gaps = gaps_of(kept, bits)
    assert ((gaps >= 0) & (gaps < 1 << bits)).all()
    assert places_of(gaps, bits).tolist() == [place for place, value in enumerate(values) if value]


def sparse(*, huffman: bool = False) -> SparseTensor:
    """(2, 4) values of which 4 are not zero; steps 0.5 and 2 for the rows."""
    return SparseTensor(
        codes=torch.tensor([3, -1, -1, 0], dtype=torch.int32),
        bits=3,
        low=-4,
        high=3,
        decoder=AffineTensor(
            codes=torch.zeros(0, dtype=torch.int32),
            bits=3,
            low=-4,
            high=3,
            scale=torch.tensor([[0.5], [2.0]]),
            granularity=PerChannel(0),
        ),
        shape=(2, 4),
        gaps=gaps_of(kept_at([0, 3, 4, 7], 8), 2),
        gap_bits=2,
        huffman=huffman,
    )


def test_values_and_size_by_hand() -> None:
    stored = sparse()
    assert stored.dequantize().tolist() == [[1.5, 0, 0, -0.5], [-2.0, 0, 0, 0.0]]
    assert stored.gaps.tolist() == [0, 2, 0, 2]
    assert stored.nbits == 4 * 3 + 4 * 2 + 2 * 32, "codes, gaps, steps"
    assert stored.code_bits == 4 * 3 + 4 * 2
    assert stored.operand_bits == 3


@pytest.mark.parametrize("huffman", [False, True])
def test_byte_count_matches_nbits_and_bytes_round_trip(huffman: bool) -> None:
    stored = sparse(huffman=huffman)
    data = pack(stored)
    assert len(data) == -(-stored.nbits // 8)
    like = replace(stored, codes=torch.zeros_like(stored.codes), gaps=torch.zeros_like(stored.gaps))
    back = unpack(data, like=like)
    assert torch.equal(back.dequantize(), stored.dequantize())
    if huffman:  # codes 3, -1, -1, 0 in 1, 2, 2 bits; gaps 0 and 2 in one; tables of 8 x 3 and 4 x 2 bits
        assert code_lengths([0, 0, 0, 2, 1, 0, 0, 1]) == [0, 0, 0, 1, 2, 0, 0, 2]
        assert stored.nbits == (24 + 6) + (8 + 4) + 64
