"""Granularities: shapes worked out by hand, rows and scales in one order, errors that name the sizes."""

from __future__ import annotations

import doctest
from collections.abc import Callable
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import qtrain.spec.blocks
import qtrain.spec.granularity
from qtrain.spec import Auto, Granularity, PerBlock, PerChannel, PerGroup, PerSample, PerTensor, PerToken
from qtrain.spec.blocks import Blocks

HUGE = 2**40

SHAPES: list[tuple[Granularity, tuple[int, ...], tuple[int, ...], int]] = [
    (PerTensor(), (), (), 1),
    (PerTensor(), (8, 4, 3, 3), (), 288),
    (PerChannel(0), (8, 4, 3, 3), (8, 1, 1, 1), 36),
    (PerChannel(1), (8, 4, 3, 3), (1, 4, 1, 1), 72),
    (PerChannel(-1), (8, 6), (1, 6), 8),
    (PerChannel(0), (5,), (5,), 1),
    (PerGroup(2), (8, 4, 3, 3), (4, 1, 1, 1), 72),
    (PerGroup(8), (8, 6), (1, 1), 48),
    (PerBlock(2), (8, 4, 3, 3), (8, 2, 1, 1), 18),
    (PerBlock(1), (3, 4), (3, 4), 1),
    (PerBlock(4), (3, 4), (3, 1), 4),
    (PerSample(), (2, 4, 3, 3), (2, 1, 1, 1), 36),
    (PerToken(), (2, 7, 5), (2, 7, 1), 5),
    (PerToken(1), (2, 4, 3, 5), (2, 1, 3, 5), 4),
    (PerChannel(0), (0, 3), (0, 1), 3),
    (PerGroup(2), (4, 0), (2, 1), 0),
    (PerBlock(2), (0, 4), (0, 2), 2),
    (PerToken(), (2, 3, 0), (2, 3, 1), 0),
]
"""Granularity, shape of a tensor, its state's shape, elements that share a scale."""


@pytest.mark.parametrize(("granularity", "shape", "state", "shared"), SHAPES, ids=str)
def test_state_shapes_match_worked_examples(
    granularity: Granularity, shape: tuple[int, ...], state: tuple[int, ...], shared: int
) -> None:
    assert granularity.state_shape(shape) == state
    rows = granularity.flatten(torch.zeros(shape))
    assert rows.shape[0] == prod(state)
    assert prod(shape) == 0 or rows.shape[1] == shared
    spread = granularity.expand(torch.zeros(state), shape)
    assert torch.broadcast_shapes(spread.shape, shape) == shape


@pytest.mark.parametrize(("granularity", "shape", "state", "shared"), SHAPES, ids=str)
def test_expand_gives_each_element_the_scale_of_its_row(
    granularity: Granularity, shape: tuple[int, ...], state: tuple[int, ...], shared: int
) -> None:
    """Numbering the states and spreading them over the tensor gives each row of the tensor its own number."""
    numbers = torch.arange(prod(state)).reshape(state)
    spread = granularity.expand(numbers, shape).expand(shape)
    rows = granularity.flatten(spread)
    assert torch.equal(rows, numbers.reshape(-1, 1).expand_as(rows))
    places = granularity.flatten(torch.arange(prod(shape)).reshape(shape))
    assert torch.equal(places.reshape(-1).sort().values, torch.arange(prod(shape))), "each element once"


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.sampled_from([0, 1]))
def test_row_maxima_match_a_loop_over_groups(count: int, size: int, other: int, axis: int) -> None:
    shape = (count * size, other) if axis == 0 else (other, count * size)
    granularity = PerGroup(size) if axis == 0 else PerBlock(size)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(count + 10 * size))
    found = granularity.flatten(x).amax(dim=1).reshape(granularity.state_shape(shape))
    for i in range(count):
        part = x.narrow(axis, i * size, size)
        expected = part.max() if axis == 0 else part.amax(dim=1)
        assert torch.equal(found.select(axis, i).reshape(-1), expected.reshape(-1))


def test_channels_last_changes_nothing() -> None:
    x = torch.randn(4, 6, 3, 3, generator=torch.Generator().manual_seed(0))
    for granularity in (PerTensor(), PerChannel(1), PerGroup(2), PerBlock(3), PerSample(), PerToken(1)):
        assert torch.equal(granularity.flatten(x.to(memory_format=torch.channels_last)), granularity.flatten(x))


@pytest.mark.parametrize(
    ("granularity", "shape", "message"),
    [
        (PerChannel(0), (), r"PerChannel: axis 0 is outside a tensor of shape \(\); use PerTensor\(\)"),
        (PerChannel(2), (4, 3), r"PerChannel: axis 2 is outside a tensor of shape \(4, 3\)"),
        (PerToken(-3), (4, 3), r"PerToken: axis -3 is outside a tensor of shape \(4, 3\)"),
        (PerBlock(2), (4,), r"PerBlock: axis 1 is outside a tensor of shape \(4,\)"),
        (PerGroup(3), (8, 6), r"PerGroup: size 3 does not divide 8 output channels; use one of \[1, 2, 4, 8\]"),
        (PerBlock(4), (8, 6), r"PerBlock: size 4 does not divide 6 input channels; use one of \[1, 2, 3, 6\]"),
    ],
)
def test_impossible_granularities_are_refused(granularity: Granularity, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        granularity.state_shape(shape)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [PerGroup, PerBlock])
def test_size_below_one_is_refused(kind: type[PerGroup] | type[PerBlock]) -> None:
    with pytest.raises(ValueError, match=rf"{kind.__name__}: size must be at least 1, got 0"):
        kind(0)


def test_auto_stands_for_channels_of_a_weight_and_the_whole_of_an_input() -> None:
    assert Auto().of((8, 4, 3, 3)) == PerChannel(0)
    assert Auto().of(()) == PerTensor()
    assert Auto().state_shape((8, 4, 3, 3)) == (8, 1, 1, 1)
    for ask in (lambda: Auto().flatten(torch.zeros(2, 3)), lambda: Auto().expand(torch.zeros(2, 1), (2, 3))):
        with pytest.raises(TypeError, match=r"call of\(\) with the shape that is known ahead"):
            ask()


@pytest.mark.parametrize("module", [qtrain.spec.granularity, qtrain.spec.blocks])
def test_docstring_examples_hold(module: object) -> None:
    result = doctest.testmod(module)  # type: ignore[arg-type]
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize(
    ("state", "spread"),
    [
        (torch.ones(1, 1), lambda state: PerGroup(HUGE).expand(state, (4, 3))),
        (torch.ones(4, 1), lambda state: PerBlock(HUGE).expand(state, (4, 3))),
        (torch.ones(4, 1), lambda state: Blocks(HUGE).spread(state, (4, 3))),
        (torch.ones(4, 3), Blocks(HUGE).largest),
    ],
)
def test_a_size_beyond_the_tensor_takes_no_memory(state: Tensor, spread: Callable[[Tensor], Tensor]) -> None:
    assert spread(state).numel() in (4, 12)
