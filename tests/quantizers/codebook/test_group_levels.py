"""Levels of each group: nearest level and sums over each level's values, against the search of all pairs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qtrain.quantizers.codebook.group_levels import nearest_rank, nearest_value, sums_by_level
from qtrain.spec import Granularity, PerBlock, PerChannel, PerGroup, PerTensor

SHAPE = (4, 8, 3, 3)
GRANULARITIES = [PerTensor(), PerChannel(0), PerGroup(2), PerBlock(4)]


def values(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def levels_of(granularity: Granularity, count: int = 5) -> Tensor:
    state = granularity.state_shape(SHAPE)
    return torch.randn(count, *state, generator=torch.Generator().manual_seed(9)).sort(dim=0).values


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_ranks_values_and_sums_are_those_of_a_search(granularity: Granularity) -> None:
    x, of, levels = values(0), values(1), levels_of(granularity)
    each = torch.stack([granularity.expand(level, SHAPE).expand(SHAPE) for level in levels])
    rank = (x - each).abs().argmin(dim=0)
    assert torch.equal(nearest_rank(x, levels, granularity), rank)
    assert torch.equal(nearest_value(x, levels, granularity), each.gather(0, rank[None])[0])
    counts, sums = sums_by_level(x, of, levels, granularity)
    ranks, rows = granularity.flatten(rank), granularity.flatten(of).double()
    for level in range(len(levels)):
        there = ranks == level
        assert torch.equal(counts[level], there.sum(dim=1).float())
        torch.testing.assert_close(sums[level].double(), (rows * there).sum(dim=1), rtol=1e-5, atol=1e-5)


def test_halfway_the_lower_level_is_nearest_and_empty_tensors_have_none() -> None:
    levels = torch.tensor([-1.0, 0.0, 2.0])
    x = torch.tensor([-0.5, 1.0, 1.0001])
    assert nearest_rank(x, levels, PerTensor()).tolist() == [0, 1, 2]
    assert nearest_value(x, levels, PerTensor()).tolist() == [-1.0, 0.0, 2.0]
    assert sums_by_level(x, torch.ones(3), levels, PerTensor())[0].tolist() == [[1.0], [1.0], [1.0]]
    empty = torch.zeros(0)
    counts, sums = sums_by_level(empty, empty, levels, PerTensor())
    assert nearest_value(empty, levels, PerTensor()).shape == (0,)
    assert counts.tolist() == sums.tolist() == [[0.0]] * 3


@pytest.mark.slow
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_compiled_code_gives_the_same_values(granularity: Granularity) -> None:
    x, levels = values(0), levels_of(granularity)
    compiled = torch.compile(lambda t: nearest_value(t, levels, granularity), fullgraph=True)
    assert torch.equal(compiled(x), nearest_value(x, levels, granularity))
