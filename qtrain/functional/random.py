"""Randomness as a function: numbers hashed from (seed, epoch, sample index), on any device.

A generator is a stream: what it gives depends on how often it was asked before, so a killed run, another
number of workers or another number of ranks changes what every later sample sees. A counter-based generator has no
history: it hashes the question. Crops, flips, sample order and mixing all come from here.

The mixing step is SplitMix64's finalizer (Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA
2014, with Stafford's constants): a bijection of 64-bit integers that flips each output bit with probability one half
when one input bit changes. Only integer operations are used, and 24 bits fit float32 exactly, so that every device
gives the same numbers.
"""

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB

ORDER, CROP, MIX, SAMPLE, SPLIT, CALIBRATION, NOISE, VIEW, START, LEARN, MAKE = range(11)
"""Streams: numbers for different purposes are independent although seed, epoch and index are the same."""


def _signed(value: int) -> int:
    """The 64-bit pattern ``value`` as torch's int64 holds it."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _mix_int(z: int) -> int:
    z = ((z ^ (z >> 30)) * _MIX_1) & _MASK
    z = ((z ^ (z >> 27)) * _MIX_2) & _MASK
    return z ^ (z >> 31)


def _mix(z: Tensor) -> Tensor:
    """``_mix_int`` for int64 tensors: products wrap around; a mask makes the arithmetic right shift a logical one."""
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * _signed(_MIX_1)
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * _signed(_MIX_2)
    return z ^ ((z >> 31) & ((1 << 33) - 1))


def _hash_ints(*values: int) -> int:
    """64 bits that depend on every value and on their order."""
    state = 0
    for value in values:
        state = _mix_int((state + _GOLDEN) & _MASK) ^ (value & _MASK)
        state = _mix_int(state)
    return state


def seed_of(*values: int) -> int:
    """A 63-bit seed for a generator, from any integers: ``seed_of(seed, epoch, index)``."""
    return _hash_ints(*values) >> 1


def hash_index(*, seed: int, epoch: int, index: Tensor, stream: int) -> Tensor:
    """One 64-bit hash for each of ``index`` (N,) int64; returns (N,) int64 on its device."""
    key = _signed(_hash_ints(seed, epoch, stream))
    return _mix(_mix(index * _signed(_GOLDEN) + key) ^ key)


def uniform(*, seed: int, epoch: int, index: Tensor, stream: int, count: int) -> Tensor:
    """``count`` numbers for each sample: (N, count) float32, uniform on the 2^24 multiples of 2^-24 in [0, 1).

    ``index`` (N,) int64 holds sample numbers; the row of a sample depends on nothing but its own number, so any
    slice of a batch gives the slice of the rows.
    """
    column = torch.arange(1, count + 1, device=index.device, dtype=torch.int64) * _signed(_GOLDEN)
    bits = _mix(hash_index(seed=seed, epoch=epoch, index=index, stream=stream)[:, None] + column)
    return ((bits >> 40) & ((1 << 24) - 1)).to(torch.float32) * 2.0**-24


def permutation(*, seed: int, epoch: int, n: int, stream: int = ORDER) -> Tensor:
    """A random order of ``0..n-1``: (n,) int64 on the CPU, by sorting the hashes of the numbers."""
    return torch.argsort(hash_index(seed=seed, epoch=epoch, index=torch.arange(n), stream=stream), stable=True)


def keyed_uniform(key: Tensor, shape: tuple[int, ...], *, first: int = 0) -> Tensor:
    """Numbers for the elements of a tensor: ``shape`` float32 in [0, 1), a function of ``key`` and the element's place.

    ``key`` is 0-dim int64 on the device of the result; it is a tensor, so that a new key does not recompile the graph.
    The same key gives the same numbers on every device and rank, compiled or not. ``first`` is the place of the first
    element: that of a rank's slice within the batch.
    """
    count = 1
    for n in shape:
        count *= n
    # The compiler works out a product of places and a constant beforehand, and fails where that exceeds 64 bits. It
    # does not look through a bitwise operation.
    index = torch.arange(first, first + count, device=key.device, dtype=torch.int64).bitwise_or(0)
    bits = _mix(_mix(index * _signed(_GOLDEN) + key) ^ key)
    return (((bits >> 40) & ((1 << 24) - 1)).to(torch.float32) * 2.0**-24).reshape(shape)
