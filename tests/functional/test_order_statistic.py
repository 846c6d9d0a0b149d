"""The k-th smallest magnitude: against sorting, in every layout, with NaN and infinity, compiled."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qtrain.functional.order_statistic import SMALL, STRIDE, _bracketed, in_memory_order, kth_magnitude


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=40), st.data())
def test_against_sorting(values: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(values)))
    assert float(kth_magnitude(torch.tensor(values), k)) == sorted(map(abs, values))[k - 1]


@pytest.mark.parametrize(
    "x",
    [
        noise(4, 3, 5, 6),
        noise(4, 3, 5, 6).to(memory_format=torch.channels_last),
        noise(4, 6, 5).transpose(0, 2),
        noise(20, 30)[::2, 3:17],
        noise(7, 1).expand(7, 5),
        noise(6, 50).bfloat16(),
        torch.tensor(-2.0),
    ],
    ids=["contiguous", "channels_last", "transposed", "a part", "expanded", "bfloat16", "a scalar"],
)
def test_any_layout_and_precision(x: Tensor) -> None:
    before = x.clone()
    expected = x.float().abs().flatten().sort().values
    for k in {1, (x.numel() + 1) // 2, x.numel()}:
        found = kth_magnitude(x, k)
        assert (found.shape, found.dtype) == ((), torch.float32)
        assert float(found) == float(expected[k - 1])
    assert torch.equal(x, before), "the tensor is left as it is"


LARGE = 3 * SMALL + 5
CASES = {
    "noise": noise(LARGE),
    "behind a ReLU": noise(LARGE).relu(),
    "codes": (noise(LARGE) * 3).round(),
    "two values": (noise(LARGE) > 1).float(),
    "all alike": torch.full((LARGE,), 0.5),
    "rising": torch.arange(LARGE).float(),
    "infinite in part": noise(LARGE).masked_fill(noise(LARGE).abs() > 2, float("-inf")),
    # Every value of the sample is 1, and all others are above or below.
    "misleading": torch.where(torch.arange(LARGE) % STRIDE == 0, 1.0, 2 * noise(LARGE)),
}


@pytest.mark.parametrize("name", CASES)
def test_large_tensors_against_sorting(name: str) -> None:
    """At all ranks near the ends, and where the sample brackets, equals, or misses the value."""
    x = CASES[name]
    ordered = x.abs().sort().values
    ranks = {1, 2, 3, LARGE - 2, LARGE - 1, LARGE, *range(1, LARGE, LARGE // 40)}
    for k in ranks:
        assert float(kth_magnitude(x, k)) == float(ordered[k - 1]), k


@pytest.mark.parametrize("name", CASES)
def test_what_the_sample_gives_is_right_or_nothing(name: str) -> None:
    values = CASES[name].abs()
    ordered = values.sort().values
    found = {k: _bracketed(values, k) for k in range(1, LARGE, LARGE // 40)}
    assert all(value is None or float(value) == float(ordered[k - 1]) for k, value in found.items())
    missed = sum(value is None for value in found.values())
    assert missed == 0 or name == "misleading", "five standard deviations are enough"


def test_a_nan_in_a_large_tensor_is_the_largest() -> None:
    x = noise(LARGE)
    x[7] = float("nan")
    ordered = x.abs().sort().values
    assert kth_magnitude(x, LARGE).isnan()
    assert float(kth_magnitude(x, LARGE - 1)) == float(ordered[LARGE - 2])


def test_nan_is_the_largest() -> None:
    x = torch.tensor([float("nan"), -float("inf"), 2.0, -1.0])
    assert [float(kth_magnitude(x, k)) for k in (1, 2, 3)] == [1.0, 2.0, float("inf")]
    assert kth_magnitude(x, 4).isnan()


@pytest.mark.parametrize("k", [0, 6])
def test_there_must_be_k_values(k: int) -> None:
    with pytest.raises(ValueError, match=f"from 1 to the number of values, 5, got {k}"):
        kth_magnitude(noise(5), k)


def test_dense_tensors_are_not_copied() -> None:
    for x in (noise(4, 3, 5, 6), noise(4, 3, 5, 6).to(memory_format=torch.channels_last), noise(3, 4).t()):
        assert in_memory_order(x).data_ptr() == x.data_ptr()


def test_it_is_an_operator_of_one_graph() -> None:
    """Compiled in one graph, without gradient, and what torch asks of an operator."""
    x = noise(4, 3, 5, 6).to(memory_format=torch.channels_last).requires_grad_()

    def largest(x: Tensor) -> Tensor:
        return (x * (x.abs() > kth_magnitude(x, 350))).sum()

    compiled = torch.compile(largest, fullgraph=True)(x)
    torch.testing.assert_close(compiled, largest(x))
    (gradient,) = torch.autograd.grad(compiled, x)
    assert int(gradient.count_nonzero()) == 10, "the mask is a constant"
    torch.library.opcheck(torch.ops.qtrain.kth_magnitude.default, (x.detach(), 350))
