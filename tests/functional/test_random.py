"""Counter-based randomness: a pure function of its arguments, independent along each of them, uniform."""

from __future__ import annotations

import math

import pytest
import torch

from qtrain.functional.random import CROP, MIX, hash_index, keyed_uniform, permutation, seed_of, uniform

GOLDEN_UNIFORM = [[11592488, 15229426], [3907458, 14741356]]
GOLDEN_ORDER = [5, 4, 3, 0, 2, 7, 1, 6]
GOLDEN_SEED = 7989698012439989594


def draw(
    seed: int = 3, epoch: int = 1, n: int = 4096, stream: int = CROP, count: int = 2, device: str = "cpu"
) -> torch.Tensor:
    return uniform(seed=seed, epoch=epoch, index=torch.arange(n, device=device), stream=stream, count=count)


def reference_mix(z: int) -> int:
    """SplitMix64's finalizer with Python's unbounded integers, written independently of the module."""
    mask = 2**64 - 1
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_mixer_agrees_with_published_splitmix64() -> None:
    """The first outputs of SplitMix64 seeded with 1234567, as published with the reference C code."""
    from qtrain.functional.random import _mix

    golden = 0x9E3779B97F4A7C15
    states = [(1234567 + golden * k) % 2**64 for k in (1, 2, 3)]
    signed = torch.tensor([s - 2**64 if s >= 2**63 else s for s in states])
    outputs = [v % 2**64 for v in _mix(signed).tolist()]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert outputs == [reference_mix(s) for s in states]


def test_values_do_not_change_between_versions() -> None:
    """Golden values: another number here means that no old run can be resumed or repeated."""
    values = uniform(seed=0, epoch=0, index=torch.tensor([0, 1]), stream=CROP, count=2)
    assert (values * 2**24).long().tolist() == GOLDEN_UNIFORM
    assert permutation(seed=0, epoch=0, n=8).tolist() == GOLDEN_ORDER
    assert seed_of(1, 2, 3) == GOLDEN_SEED


def test_numbers_of_a_sample_do_not_depend_on_its_batch() -> None:
    whole = draw()
    assert torch.equal(whole, draw())
    part = uniform(seed=3, epoch=1, index=torch.tensor([17, 4000]), stream=CROP, count=2)
    assert torch.equal(part, whole[[17, 4000]])
    assert torch.equal(draw(count=5)[:, :2], whole)


@pytest.mark.parametrize("other", [dict(seed=4), dict(epoch=2), dict(stream=MIX)])
def test_seed_epoch_and_stream_give_independent_numbers(other: dict[str, int]) -> None:
    a, b = draw(n=1 << 15, count=1).flatten(), draw(n=1 << 15, count=1, **other).flatten()
    correlation = torch.corrcoef(torch.stack([a, b]))[0, 1].item()
    assert abs(correlation) < 5 / math.sqrt(a.numel())
    assert (a == b).float().mean() < 1e-3


def test_uniform_in_range_and_flat() -> None:
    """Chi-square over 64 cells: mean 63, standard deviation 11.2; also the neighbors are uncorrelated."""
    values = draw(n=1 << 16, count=2)
    assert values.dtype == torch.float32
    assert values.min() >= 0 and values.max() < 1
    for column in values.T:
        counts = torch.histc(column, bins=64, min=0, max=1)
        expected = column.numel() / 64
        assert ((counts - expected) ** 2 / expected).sum() < 63 + 5 * 11.2
        lag = torch.corrcoef(torch.stack([column[:-1], column[1:]]))[0, 1]
        assert abs(lag.item()) < 5 / math.sqrt(column.numel())
    assert abs(torch.corrcoef(values.T)[0, 1].item()) < 5 / math.sqrt(values.shape[0])


def test_hash_has_no_collisions_over_an_imagenet_epoch() -> None:
    hashes = hash_index(seed=0, epoch=5, index=torch.arange(1 << 20), stream=0)
    assert hashes.unique().numel() == hashes.numel()


def test_permutation_is_valid_and_changes_with_the_epoch() -> None:
    first, second = permutation(seed=0, epoch=0, n=1000), permutation(seed=0, epoch=1, n=1000)
    assert torch.equal(first.sort().values, torch.arange(1000))
    assert not torch.equal(first, second)
    assert (first == torch.arange(1000)).sum() < 10


def test_seed_of_depends_on_order_and_every_argument() -> None:
    seeds = {seed_of(a, b) for a in range(50) for b in range(50)}
    assert len(seeds) == 2500
    assert all(0 <= s < 2**63 for s in seeds)
    assert seed_of(1) != seed_of(1, 0)
    assert seed_of(-1) != seed_of(1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_devices_agree_bit_for_bit() -> None:
    assert torch.equal(draw(device="cuda").cpu(), draw())


def test_a_slice_of_a_batch_draws_the_slice_of_its_numbers() -> None:
    key = torch.tensor(123)
    whole = keyed_uniform(key, (6, 2, 3))
    parts = [keyed_uniform(key, (2, 2, 3), first=12 * rank) for rank in range(3)]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.slow
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_compiled_code_draws_the_same(memory_format: torch.memory_format) -> None:
    """Places times a constant of 64 bits: the compiler must not work that out with whole numbers of any length."""
    key, like = torch.tensor(0x1234_5678_9ABC_DEF), torch.zeros(16, 16, 3, 3).to(memory_format=memory_format)
    compiled = torch.compile(lambda key, like: like + keyed_uniform(key, tuple(like.shape)), fullgraph=True)
    assert torch.equal(compiled(key, like), keyed_uniform(key, (16, 16, 3, 3)))
