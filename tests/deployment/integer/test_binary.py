"""Products of signs on packed words against the plain sums of products."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qtrain.deployment.integer import binary, operators
from qtrain.deployment.integer.fixed import Fixed


def signs(*shape: int, seed: int, size: int = 1) -> Tensor:
    return size * (2 * torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)) - 1)


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1))
def test_ones_of_a_word_are_counted(words: list[int]) -> None:
    assert binary.popcount(torch.tensor(words)).tolist() == [(word % 2**64).bit_count() for word in words]


@given(st.integers(1, 130), st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.integers(0, 99))
def test_a_linear_layer_is_the_plain_product(inputs: int, rows: int, outputs: int, size: int, seed: int) -> None:
    x, weight = signs(rows, 2, inputs, seed=seed, size=size), signs(outputs, inputs, seed=seed + 1, size=3)
    found = binary.linear(x, weight)
    assert found is not None and torch.equal(found, x @ weight.T)


@given(
    axes=st.integers(1, 3), groups=st.sampled_from([1, 2, 6]), kernel=st.integers(1, 3), stride=st.integers(1, 2),
    dilation=st.integers(1, 2), before=st.integers(0, 2), after=st.integers(0, 2), seed=st.integers(0, 99),
)  # fmt: skip
def test_a_convolution_is_the_plain_one_and_its_padding_counts_for_nothing(
    axes: int, groups: int, kernel: int, stride: int, dilation: int, before: int, after: int, seed: int
) -> None:
    x = signs(2, 6, *([6, 5, 7][:axes]), seed=seed, size=5)
    weight = signs(12, 6 // groups, *([kernel] * axes), seed=seed + 1, size=64)
    pads = [before] * axes + [after] * axes
    found = binary.convolution(x, weight, [stride] * axes, pads, [dilation] * axes, groups)
    plain = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]
    padded = F.pad(x.double(), (before, after) * axes)
    expected = plain(padded, weight.double(), None, stride, 0, dilation, groups)
    assert found is not None and torch.equal(found, expected.to(torch.int64))


def test_numbers_of_more_than_two_values_are_left_to_the_plain_product() -> None:
    two, three = signs(2, 4, seed=0), torch.tensor([[1, -1, 0, 1], [1, 1, -1, 2]])
    assert binary.linear(two, three) is None
    assert binary.linear(three, two) is None
    assert binary.linear(torch.zeros(2, 4, dtype=torch.int64), two) is None


@pytest.mark.parametrize("threshold", [-0.3, 0.0, 0.14, 0.1400001])
def test_a_sign_is_that_of_the_number_less_its_threshold(threshold: float) -> None:
    x = Fixed(torch.arange(-8, 9), torch.tensor(0.07, dtype=torch.float64), 8)
    found = operators.OPERATORS["GreaterOrEqual"]([x, torch.tensor(threshold, dtype=torch.float64)], {})
    assert found.tolist() == [int(number * 0.07 >= threshold) for number in range(-8, 9)]
