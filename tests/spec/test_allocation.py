"""Sums of scores and costs."""

import pytest

from qtrain.spec import Choice, CostTable, LayerBits, Scores

W4A8, W2A2 = LayerBits(4, 8), LayerBits(2, 2)


def test_a_score_adds_weights_inputs_and_pairs_that_are_chosen() -> None:
    pairs = {
        (Choice("a", "weight", 4), Choice("b", "input", 2)): 0.5,
        (Choice("a", "weight", 2), Choice("b", "input", 2)): 99.0,
    }
    scores = Scores({"a": {4: 1.0, 2: 8.0}, "b": {2: 3.0}}, {"a": {8: 0.25}, "b": {2: 2.0}}, pairs)
    assert scores.of("a", W4A8) == 1.25
    assert scores.total({"a": W4A8, "b": W2A2}) == 1.25 + 5.0 + 0.5


def test_what_is_left_of_a_weights_error_leaves_inputs_alone_and_counts_by_its_root_in_pairs() -> None:
    weight, input = Choice("a", "weight", 2), Choice("a", "input", 2)
    pairs = {(weight, Choice("b", "weight", 2)): 4.0, (weight, input): 4.0, (input, Choice("b", "input", 2)): 4.0}
    left = Scores({"a": {2: 8.0}}, {"a": {2: 8.0}}, pairs).with_weight_error(0.25)
    assert (left.weight, left.input) == ({"a": {2: 2.0}}, {"a": {2: 8.0}})
    assert list(left.pairs.values()) == [1.0, 2.0, 4.0]


def test_a_width_without_a_score_counts_nothing() -> None:
    assert Scores({"a": {4: 1.0}}, {}).of("a", LayerBits(32, 32)) == 0.0


def test_a_cost_is_the_fixed_part_and_that_of_each_option() -> None:
    table = CostTable("bytes", 10.0, {"a": {W4A8: 3.0, W2A2: 2.0}, "b": {W2A2: 4.0}})
    assert table.total({"a": W4A8, "b": W2A2}) == 17.0


def test_a_cost_of_an_option_that_the_table_lacks_is_refused() -> None:
    with pytest.raises(KeyError):
        CostTable("bytes", 0.0, {"a": {W2A2: 1.0}}).total({"a": W4A8})
