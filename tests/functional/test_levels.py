"""The nearest of given levels: one answer, however it is computed."""

from __future__ import annotations

import pytest
import torch

from qtrain.functional.levels import FEW, mirrored, nearest_level, nearest_value, sums_of_powers


@pytest.mark.parametrize("bits", [1, 2, 3, 5])
def test_compiled_code_chooses_the_same_levels(bits: int) -> None:
    levels = torch.tensor(mirrored(sums_of_powers(bits)))
    assert (len(levels) > FEW) == (bits == 5), "both ways are tried"
    ties = (levels[:-1] + levels[1:]) / 2
    around = [levels, ties, torch.nextafter(ties, torch.tensor(2.0)), torch.nextafter(ties, torch.tensor(-2.0))]
    t = torch.cat([*around, torch.tensor([-3.0, 3.0, float("inf"), float("-inf"), float("nan")])])
    # As it is traced, and no further: no C++ compiler.
    compiled = torch.compile(nearest_value, backend="eager", fullgraph=True)(t, levels)
    assert torch.equal(compiled, levels[nearest_level(t, levels)])


def test_no_level_is_nearer() -> None:
    levels = torch.tensor(mirrored(sums_of_powers(3)))
    t = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    best = (t[:, None] - levels).abs().amin(dim=1)
    assert torch.equal((t - nearest_value(t, levels)).abs(), best)
