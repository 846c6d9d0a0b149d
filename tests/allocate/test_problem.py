"""The question of a search: which layers choose together, and what is refused before any search."""

import pytest

from qtrain.allocate.problem import Problem
from qtrain.spec import CostTable, LayerBits

W2, W4, W8 = LayerBits(2, 8), LayerBits(4, 8), LayerBits(8, 8)
SIZE = CostTable("bytes", 100.0, {n: {W2: 2.0, W4: 4.0, W8: 8.0} for n in "abc"})


def test_ties_that_share_a_layer_are_one_group_with_the_options_of_all() -> None:
    problem = Problem({"a": (W2, W4), "b": (W4, W8), "c": (W4,)}, ties=[["a", "b"], ["b", "c"]])
    (group,) = problem.groups()
    assert group.layers == ("a", "b", "c")
    assert group.options == (W4,)


def test_tied_layers_without_common_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="tied: a, b have no bits in common"):
        Problem({"a": (W2,), "b": (W8,)}, ties=[["a", "b"]])


def test_a_budget_below_the_cheapest_is_refused_and_names_it() -> None:
    with pytest.raises(ValueError, match=r"budgets\.size: 105 bytes cannot be reached; .* is 106 bytes"):
        Problem(dict.fromkeys("abc", (W2, W4)), {"size": SIZE}, {"size": 105.0})


def test_a_budget_of_an_unknown_cost_is_refused() -> None:
    with pytest.raises(ValueError, match=r"budgets\.latency: there is no such cost; there are size"):
        Problem(dict.fromkeys("abc", (W2,)), {"size": SIZE}, {"latency": 1.0})


def test_shares_of_a_group_are_those_of_its_layers_together() -> None:
    problem = Problem(dict.fromkeys("abc", (W2, W4)), {"size": SIZE}, {"size": 200.0}, ties=[["a", "c"]])
    tied, alone = problem.groups()
    assert tied.layers == ("a", "c")
    assert tied.costs.tolist() == [[4 / 200, 8 / 200]]
    assert alone.costs.tolist() == [[2 / 200, 4 / 200]]
    assert problem.room().tolist() == [0.5], "the fixed part is paid"
