"""The nearest of fixed levels, by search, by comparison and by table: all the same, at every boundary."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qtrain.functional.levels import (
    bucket,
    cells_suffice,
    looked_up,
    midpoints_of,
    mirrored,
    nearest_level,
    nearest_of_powers,
    powers_of_two,
    sums_of_powers,
)


def around(boundaries: Tensor) -> Tensor:
    """Each boundary, its two neighbors among float32, and values between all of them."""
    up, down = (torch.nextafter(boundaries, torch.tensor(end)) for end in (torch.inf, -torch.inf))
    return torch.cat([boundaries, up, down, torch.linspace(-1, 1, 4001), torch.tensor([0.0, -0.0])])


def padded(levels: list[float], length: int = 255) -> Tensor:
    return torch.tensor(levels + levels[-1:] * (length - len(levels)))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", range(1, 9))
def test_the_table_gives_the_level_that_the_search_finds(bits: int, signed: bool) -> None:
    levels = sums_of_powers(bits - 1 if signed and bits > 1 else bits)
    levels = mirrored(levels) if signed else levels
    table = padded(levels, 256)
    assert cells_suffice(table)
    middle = midpoints_of(torch.tensor(levels))
    t = around(middle).clamp(levels[0], levels[-1])
    assert torch.equal(looked_up(t, table), table[nearest_level(t, table)])
    t = t[(t[:, None] - middle).abs().amin(dim=1) > 1e-6]  # of the others rounding decides
    expected = [min(levels, key=lambda level, v=float(v): abs(level - v)) for v in t]
    assert len(t) > 2000
    torch.testing.assert_close(looked_up(t, table), torch.tensor(expected), atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("compiling", [True, False])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", range(2, 8))
def test_bit_patterns_give_the_power_that_the_search_finds(
    bits: int, signed: bool, compiling: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels = mirrored(powers_of_two(bits - 1)) if signed else powers_of_two(bits)
    table = padded(levels)
    t = around(midpoints_of(torch.tensor(levels))).clamp(levels[0], levels[-1])
    t = torch.cat([t, torch.tensor(levels), torch.tensor([2.0**-127, -(2.0**-127), 2.0**-149])]).clamp(levels[0], 1.0)
    t, table = t.to(dtype), table.to(dtype)
    expected = table[nearest_level(t, table)]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    assert torch.equal(nearest_of_powers(t, table), expected)


def test_levels_that_are_too_dense_for_the_table_are_told() -> None:
    assert cells_suffice(torch.tensor(powers_of_two(3)))
    assert not cells_suffice(torch.tensor(powers_of_two(4))), "2^-14 and its half are in one cell"
    assert [cells_suffice(torch.linspace(0, 1, count)) for count in (256, 257)] == [True, False], "an index is a byte"


@pytest.mark.parametrize("count", [1, 2, 15, 32, 33, 127, 128, 254])
def test_compiled_code_counts_boundaries_as_eager_code_does(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    boundaries = torch.linspace(-0.9, 0.9, count).square().cumsum(0) / count - 0.5
    t = around(boundaries).reshape(1, -1).expand(2, -1)
    expected = torch.tensor([[int((boundaries < v).sum()) for v in row] for row in t])
    assert torch.equal(bucket(t, boundaries), expected)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    found = bucket(t, boundaries)
    assert torch.equal(found, expected) and found.dtype == torch.int64


def test_of_two_levels_as_near_the_lower_one_is_taken() -> None:
    levels, t = torch.tensor([0.0, 0.25, 0.5, 1.0]), torch.tensor([0.125, 0.375, 0.75])
    assert nearest_level(t, levels).tolist() == [0, 1, 2]
    assert looked_up(t, levels).tolist() == [0.0, 0.25, 0.5]
