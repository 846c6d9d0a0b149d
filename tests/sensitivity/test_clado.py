"""Pairs of choices against the exact second derivative, and refused where there are too many."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qtrain.convert.bank import Widths
from qtrain.sensitivity.clado import Clado
from qtrain.sensitivity.one_layer import OneLayer
from qtrain.spec import Choice, LayerBits


def test_pairs_make_the_sum_exact_for_two_layers(small_bank: Any, whole: Any) -> None:
    bank, batches = small_bank(nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten(), nn.Linear(4, 4)))
    scores = Clado()(bank, batches, seed=0)
    single = OneLayer(measure="loss")(bank, batches, seed=0)
    assert scores.weight == single.weight
    assert scores.input == single.input
    images, target = whole(batches)
    loss = nn.CrossEntropyLoss()
    for first in (3, 6):
        for second in (3, 6):
            allocation = {"0": LayerBits(first, 32), "2": LayerBits(second, 32)}
            with torch.no_grad():
                bank.use_({})
                before = loss(bank.model(images).double(), target)
                bank.use_(allocation)
                rise = float(loss(bank.model(images).double(), target) - before)
            assert scores.total(allocation) == pytest.approx(rise, abs=1e-6)
            assert (Choice("0", "weight", first), Choice("2", "weight", second)) in scores.pairs


def test_pair_is_the_product_with_the_hessian_where_changes_are_small(small_bank: Any, whole: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten(), nn.Linear(4, 4))
    bank, batches = small_bank(model, widths=Widths((10,), ()), dtype=torch.float64)
    pair = (Choice("0", "weight", 10), Choice("2", "weight", 10))
    found = Clado()(bank, batches, seed=0).pairs[pair]
    images, target = whole(batches)
    weights = [bank.layers[name].weight.detach() for name in ("0", "2")]
    changes = [bank.quantizers[c.layer]["weight"][10](w).detach() - w for c, w in zip(pair, weights, strict=True)]

    def loss(a: Tensor, b: Tensor) -> Tensor:
        logits = torch.func.functional_call(bank.model, {"0.weight": a, "2.weight": b}, (images,))
        return nn.functional.cross_entropy(logits, target)

    def slope(a: Tensor) -> Tensor:
        return torch.func.jvp(lambda b: loss(a, b), (weights[1],), (changes[1],))[1]

    expected = torch.func.jvp(slope, (weights[0],), (changes[0],))[1]
    assert found == pytest.approx(float(expected.detach()), rel=0.05)


def test_too_many_pairs_are_refused_with_their_number(small_bank: Any) -> None:
    bank, batches = small_bank()
    with pytest.raises(ValueError, match=r"Clado: 22 choices make 220 pairs, .* pairs allows 100; choose from fewer"):
        Clado(pairs=100)(bank, batches, seed=0)
