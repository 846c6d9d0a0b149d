"""Whole numbers in a canonical Huffman code: frequent ones take few bits, and the code itself is counted."""

import heapq
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor

from qtrain.storage.base import WIDEST, Part
from qtrain.storage.bits import Bits, BitStream, from_integer_bits, integer_bits

_WINDOW = 1 << 18
"""Bits whose words are looked for at a time, since a place in the stream takes far more memory than its bit."""

_LONGEST = 62
"""Bits of the longest word: with so many, rare symbols would need more numbers than fit into a file."""


def code_lengths(counts: list[int]) -> list[int]:
    """Length in bits of each symbol's code word in a Huffman code; 0 for symbols that do not occur.

    ``sum(count * length)`` is the least that any prefix code reaches (Huffman 1952). A lone symbol takes one bit.
    """
    heap = [(count, symbol, [symbol]) for symbol, count in enumerate(counts) if count]
    lengths = [0] * len(counts)
    if len(heap) == 1:
        lengths[heap[0][1]] = 1
    heapq.heapify(heap)
    while len(heap) > 1:
        rare, next_rare = heapq.heappop(heap), heapq.heappop(heap)
        merged = rare[2] + next_rare[2]
        for symbol in merged:
            lengths[symbol] += 1
        # The first symbol breaks ties, so that equal counts give equal codes everywhere.
        heapq.heappush(heap, (rare[0] + next_rare[0], min(rare[1], next_rare[1]), merged))
    return lengths


def code_words(lengths: list[int]) -> list[int]:
    """The canonical code words: counted up in the order of (length, symbol), so that the lengths tell all."""
    words = [0] * len(lengths)
    word = last = 0
    for length, symbol in sorted((length, symbol) for symbol, length in enumerate(lengths) if length):
        word <<= length - last
        words[symbol], last = word, length
        word += 1
    return words


def huffman_encode(symbols: np.ndarray, lengths: list[int]) -> np.ndarray:
    """The code words of ``symbols`` (n,) int64, one after the other: (total,) uint8 of 0 and 1."""
    each = np.asarray(lengths, dtype=np.int64)[symbols]
    ends = np.repeat(np.cumsum(each), each)
    places = ends - 1 - np.arange(ends.size)
    words = np.repeat(np.asarray(code_words(lengths), dtype=np.int64)[symbols], each)
    return ((words >> places) & 1).astype(np.uint8)


def huffman_decode(stream: BitStream, lengths: list[int], count: int) -> tuple[np.ndarray, int]:
    """``count`` symbols from the head of ``stream``, (count,) int64, and how many bits they took.

    Raises ``RuntimeError`` where the bits end too early, or no code word fits.
    """
    longest = max(lengths, default=0)
    if count > stream.numel() or longest > _LONGEST:
        raise RuntimeError(
            f"huffman_decode: {stream.numel()} bits with words of up to {longest} cannot hold {count} symbols"
        )
    words = _canonical(lengths)
    found, place = np.empty(count, dtype=np.int64), 0
    done = 0
    while done < count:
        window = stream[place : place + _WINDOW + longest].numpy()
        symbol_at, length_at = (part.tolist() for part in _words_at(window, words))
        taken: list[int] = []
        at = 0
        while at < _WINDOW and done + len(taken) < count:
            if at >= len(length_at) or not length_at[at]:
                raise RuntimeError("huffman_decode: the bits end too early, or hold no code word")
            taken.append(symbol_at[at])
            at += length_at[at]
        found[done : done + len(taken)] = taken
        done, place = done + len(taken), place + at
    return found, place


def _canonical(lengths: list[int]) -> dict[int, tuple[int, np.ndarray]]:
    """Of each length that occurs the first word, and the symbols whose words count up from it."""
    words = code_words(lengths)
    found: dict[int, list[int]] = {}
    for symbol, length in enumerate(lengths):
        if length:
            found.setdefault(length, []).append(symbol)
    return {length: (words[found[length][0]], np.asarray(found[length])) for length in sorted(found)}


def _words_at(bits: np.ndarray, words: dict[int, tuple[int, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    # For every place in the stream the symbol whose code word starts there, and its length; 0 where none does.
    symbol_at, length_at = np.zeros(bits.size, dtype=np.int64), np.zeros(bits.size, dtype=np.int64)
    value = np.zeros(bits.size, dtype=np.int64)
    for length in range(1, min(max(words, default=0), bits.size) + 1):
        value = 2 * value[: bits.size - length + 1] + bits[length - 1 :]
        if length in words:
            first, symbols = words[length]
            offset = value - first
            starts = np.flatnonzero((offset >= 0) & (offset < len(symbols)) & (length_at[: value.size] == 0))
            symbol_at[starts], length_at[starts] = symbols[offset[starts]], length
    return symbol_at, length_at


@final
@dataclass(frozen=True)
class HuffmanPart(Part):
    """Whole numbers ``low <= values < low + 2^bits`` in a canonical Huffman code of their own frequencies.

    The code length of each of the ``2^bits`` symbols is stored in ``bits`` bits, which are always enough, and then the
    code words. Nothing is lost, also for one symbol (one bit each) and for none. Source: Deep Compression, arXiv
    1510.00149, §4.
    """

    values: Tensor
    bits: int
    low: int = 0

    def _symbols(self) -> np.ndarray:
        symbols = self.values.detach().cpu().reshape(-1).to(torch.int64) - self.low
        if symbols.numel() and not (int(symbols.min()) >= 0 and int(symbols.max()) < 1 << self.bits):
            high = self.low + (1 << self.bits) - 1
            raise ValueError(f"HuffmanPart: values must lie in {self.low}..{high} to fit {self.bits} bits")
        return symbols.numpy()

    def _counts(self) -> list[int]:
        counts: list[int] = np.bincount(self._symbols(), minlength=1 << self.bits).tolist()
        return counts

    @property
    def nbits(self) -> int:
        counts = self._counts()
        words = sum(count * length for count, length in zip(counts, code_lengths(counts), strict=True))
        return (self.bits << self.bits) + words

    def write(self) -> Bits:
        lengths = code_lengths(self._counts())
        table = integer_bits(torch.tensor(lengths), self.bits)
        return torch.cat([table, torch.from_numpy(huffman_encode(self._symbols(), lengths))])

    def read(self, stream: BitStream) -> tuple[Tensor, BitStream]:
        table = self.bits << self.bits if self.bits <= WIDEST else 0
        if not 0 < table <= stream.numel():
            raise RuntimeError("HuffmanPart: the bits end inside the table of code lengths")
        lengths = from_integer_bits(stream[:table], self.bits).tolist()
        symbols, used = huffman_decode(stream[table:], lengths, self.values.numel())
        values = torch.from_numpy(symbols) + self.low
        return values.to(self.values.dtype).reshape(self.values.shape), stream[table + used :]
