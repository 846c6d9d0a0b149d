"""One value out of a few by its place between boundaries: one answer, however it is computed."""

from __future__ import annotations

import pytest
import torch

from qtrain.functional.levels import bucket, chosen, mirrored, nearest_level, sums_of_powers


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_comparisons_choose_what_an_index_looks_up(bits: int) -> None:
    levels = torch.tensor(mirrored(sums_of_powers(bits)))
    ties = (levels[:-1] + levels[1:]) / 2
    around = [levels, ties, torch.nextafter(ties, torch.tensor(2.0)), torch.nextafter(ties, torch.tensor(-2.0))]
    t = torch.cat([*around, torch.tensor([-3.0, 3.0, float("inf"), float("-inf"), float("nan")])])
    assert torch.equal(chosen(t, ties, levels), levels[bucket(t, ties)])
    assert torch.equal(chosen(t, [*ties], [*levels]), levels[nearest_level(t, levels)])


def test_no_level_is_nearer() -> None:
    levels = torch.tensor(mirrored(sums_of_powers(3)))
    t = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    best = (t[:, None] - levels).abs().amin(dim=1)
    assert torch.equal((t - levels[nearest_level(t, levels)]).abs(), best)
