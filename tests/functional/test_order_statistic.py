"""The k-th smallest magnitude: against sorting, in every layout, with NaN and infinity, compiled."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qtrain.functional.order_statistic import in_memory_order, kth_magnitude


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
