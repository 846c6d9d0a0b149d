"""Labels in turn, and mixtures as targets."""

from __future__ import annotations

import pytest
import torch

from qtrain.synthesis.conditioning import Mixture, labels_in_turn


@pytest.mark.parametrize(("num_classes", "count"), [(10, 4), (3, 10), (7, 7), (100, 6)])
def test_each_round_has_each_class_once(num_classes: int, count: int) -> None:
    options = {"count": count, "num_classes": num_classes, "seed": 3, "stream": 1}
    batches = [labels_in_turn(number=number, **options) for number in range(num_classes)]
    assert all(batch.shape == (count,) and batch.dtype == torch.int64 for batch in batches)
    rounds = torch.cat(batches).reshape(count, num_classes)  # as many labels as that many whole rounds
    assert all(sorted(one.tolist()) == list(range(num_classes)) for one in rounds)
    assert count < 2 or any(not torch.equal(rounds[0], later) for later in rounds[1:]), "each in another order"
    again = labels_in_turn(number=2, **options)
    assert torch.equal(again, batches[2])
    others = [labels_in_turn(number=2, **{**options, name: 9}) for name in ("seed", "stream")]
    assert num_classes < 10 or not any(torch.equal(again, other) for other in others)


def test_a_mixture_as_a_target() -> None:
    mixture = Mixture(torch.tensor([[2, 0], [1, 3]]), torch.tensor([[0.75, 0.25], [1.0, 0.0]]))
    assert mixture.probabilities(4).tolist() == [[0.25, 0, 0.75, 0], [0, 1, 0, 0]]
