"""The Huffman code: lengths by hand and by search, the entropy bounds, and bytes without loss."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtrain.storage import huffman
from qtrain.storage.affine import AffineTensor
from qtrain.storage.base import pack, unpack
from qtrain.storage.codebook import CodebookTensor
from qtrain.storage.huffman import HuffmanPart, code_lengths, code_words, huffman_decode

COUNTS = st.lists(st.integers(0, 1000), min_size=1, max_size=40).filter(any)


def test_code_lengths_match_the_textbook_example() -> None:
    """Cormen et al., "Introduction to Algorithms", metric 16.3: a 45, b 13, c 12, d 16, e 9, f 5 take 224 bits."""
    counts = [45, 13, 12, 16, 9, 5]
    assert code_lengths(counts) == [1, 3, 3, 3, 4, 4]
    assert sum(c * n for c, n in zip(counts, code_lengths(counts), strict=True)) == 224
    assert [f"{w:0{n}b}" for w, n in zip(code_words([1, 3, 3, 3, 4, 4]), [1, 3, 3, 3, 4, 4], strict=True)] == [
        "0", "100", "101", "110", "1110", "1111",
    ]  # fmt: skip


@given(COUNTS)
def test_mean_length_is_within_one_bit_of_the_entropy(counts: list[int]) -> None:
    total, lengths = sum(counts), code_lengths(counts)
    entropy = -sum(c / total * math.log2(c / total) for c in counts if c)
    mean = sum(c * n for c, n in zip(counts, lengths, strict=True)) / total
    assert entropy - 1e-9 <= mean
    assert mean < entropy + 1 + 1e-9
    if sum(c > 0 for c in counts) > 1:  # Kraft's inequality, with equality: no word is wasted
        assert sum(2.0**-n for n in lengths if n) == 1


@given(COUNTS)
def test_code_words_are_prefix_free(counts: list[int]) -> None:
    lengths = code_lengths(counts)
    words = [f"{w:0{n}b}" for w, n in zip(code_words(lengths), lengths, strict=True) if n]
    assert len(words) == sum(c > 0 for c in counts)
    assert not any(b.startswith(a) for a, b in itertools.permutations(words, 2))


@given(st.lists(st.integers(1, 12), min_size=2, max_size=4))
def test_huffman_code_is_the_shortest_prefix_code(counts: list[int]) -> None:
    """All lengths up to 4 that satisfy Kraft's inequality, tried."""
    least = min(
        sum(c * n for c, n in zip(counts, lengths, strict=True))
        for lengths in itertools.product(range(1, 5), repeat=len(counts))
        if sum(2.0**-n for n in lengths) <= 1
    )
    assert sum(c * n for c, n in zip(counts, code_lengths(counts), strict=True)) == least


@given(st.data(), st.integers(1, 6), st.sampled_from([-8, 0, 3]))
def test_huffman_part_round_trips_through_bytes(data: st.DataObject, bits: int, low: int) -> None:
    values = data.draw(st.lists(st.integers(low, low + 2**bits - 1), max_size=200))
    part = HuffmanPart(torch.tensor(values, dtype=torch.int32), bits, low)
    after = torch.tensor([1, 0, 1], dtype=torch.uint8)
    assert part.write().numel() == part.nbits
    like = dataclasses.replace(part, values=torch.full_like(part.values, low))
    read, rest = like.read(torch.cat([part.write(), after]))
    assert read.dtype == torch.int32
    assert read.tolist() == values
    assert torch.equal(rest, after)


@pytest.mark.parametrize(("values", "words"), [([], 0), ([2], 1), ([5] * 7, 7)])
def test_one_symbol_and_no_symbol_round_trip(values: list[int], words: int) -> None:
    """The table of 8 lengths of 3 bits, and one bit for each value."""
    part = HuffmanPart(torch.tensor(values, dtype=torch.int64), 3)
    assert part.nbits == 8 * 3 + words


def test_affine_and_codebook_tensors_round_trip_with_huffman() -> None:
    """120 zeros and 8 others of 2 bits: 4 lengths of 2 bits, 120 words of 1 bit, 4 of 2 bits, 2 and 2 of 3 bits."""
    codes = torch.tensor([0] * 120 + [1] * 4 + [2] * 2 + [3] * 2, dtype=torch.int32)
    affine = AffineTensor(codes=codes, bits=2, low=0, high=3, scale=torch.tensor(0.5), huffman=True)
    table = CodebookTensor(codes=codes, bits=2, low=0, high=3, codebook=torch.arange(4.0), huffman=True)
    assert affine.code_bits == table.code_bits == 4 * 2 + 120 + 4 * 2 + 4 * 3
    assert affine.nbits == affine.code_bits + 32
    assert table.nbits == table.code_bits + 4 * 32
    for stored in (affine, table):
        like = dataclasses.replace(stored, codes=torch.zeros_like(codes))
        assert torch.equal(unpack(pack(stored), like).dequantize(), stored.dequantize())


def test_a_file_that_was_cut_off_is_refused() -> None:
    codes = torch.arange(16, dtype=torch.int32).repeat(4)
    stored = CodebookTensor(codes=codes, bits=4, low=0, high=15, codebook=torch.arange(16.0), huffman=True)
    for length in (3, 20):
        with pytest.raises(ValueError, match="too few"):
            unpack(pack(stored)[:length], stored)


def test_a_stream_longer_than_the_window_is_decoded_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randint(-8, 8, (999,), generator=torch.Generator().manual_seed(0)).clamp(-3, 5)
    part = HuffmanPart(values, 4, -8)
    written = part.write()
    for window in (1, 7, 64, 1 << 18):
        monkeypatch.setattr(huffman, "_WINDOW", window)
        read, rest = part.read(torch.cat([written, torch.ones(5, dtype=torch.uint8)]))
        assert torch.equal(read, values)
        assert rest.tolist() == [1] * 5


@pytest.mark.parametrize(("bits", "shape"), [(40, (4,)), (0, (4,)), (4, (1 << 40,)), (16, (1 << 50,))])
def test_what_no_stream_can_hold_is_refused_before_it_takes_memory(bits: int, shape: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match=r"the bits end inside the table|cannot hold"):
        HuffmanPart(torch.empty(shape, device="meta", dtype=torch.int32), bits).read(
            torch.zeros(1 << 20, dtype=torch.uint8)
        )


def test_words_longer_than_any_file_needs_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"words of up to 63 cannot hold 3 symbols"):
        huffman_decode(torch.zeros(100, dtype=torch.uint8), [1, 63], 3)


def test_values_outside_the_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"HuffmanPart: values must lie in 0\.\.3 to fit 2 bits"):
        HuffmanPart(torch.tensor([4]), 2).write()
