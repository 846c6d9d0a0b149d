"""Bits learned by gradient: where they matter there are more, the budget holds, and the network stays as it was."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from qtrain.allocate.learned import Learned
from qtrain.allocate.problem import Problem
from qtrain.convert.bank import Widths, make_bank
from qtrain.convert.layers import find_layers
from qtrain.convert.plan import LayerPlan
from qtrain.observers.min_max import MinMax
from qtrain.quantizers.uniform.lsq import LSQ
from qtrain.spec import NO_LABEL, Batch, CostTable, LayerBits, PerChannel
from tests.allocate.problems import random_problem

RECIPE = LayerPlan(
    weight=partial(LSQ, granularity=PerChannel()), input=LSQ, weight_observer=MinMax, input_observer=MinMax
)


class Branches(nn.Module):
    """Two branches of the same shape, of which one hardly counts."""

    def __init__(self) -> None:
        super().__init__()
        self.heavy, self.light = nn.Linear(16, 10), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return 8 * self.heavy(x) + 0.01 * self.light(x)


def problem() -> Problem:
    torch.manual_seed(0)
    model, images = Branches().eval(), torch.randn(64, 1, 4, 4)
    labels = model(images).argmax(1)
    bank = make_bank(model, find_layers(model, images[:2]), RECIPE, Widths((2, 8), (8,)), [images])
    options = {name: (LayerBits(2, 8), LayerBits(8, 8)) for name in ("heavy", "light")}
    table = CostTable("bytes", 0.0, {name: {bits: float(bits.weight) for bits in of} for name, of in options.items()})
    batches = [Batch(images[i : i + 16], labels[i : i + 16], torch.arange(16)) for i in range(0, 64, 16)]
    return Problem(options, {"size": table}, {"size": 10.0}, bank=bank, batches=batches)


@pytest.mark.parametrize("weight_lr", [0.0, 1e-3])
def test_the_branch_that_counts_gets_the_bits(weight_lr: float) -> None:
    asked = problem()
    assert asked.bank is not None
    before = {name: tensor.clone() for name, tensor in asked.bank.model.state_dict().items()}
    allocation = Learned(steps=40, weight_lr=weight_lr).search(asked)
    assert allocation == {"heavy": LayerBits(8, 8), "light": LayerBits(2, 8)}
    after = asked.bank.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before), "the network itself is not changed"


def test_of_a_tight_budget_nothing_is_left_and_of_a_wide_one_everything() -> None:
    """Nothing speaks against eight bits but the budget."""
    asked = problem()
    loose = Problem(asked.options, asked.costs, {"size": 100.0}, bank=asked.bank, batches=asked.batches)
    assert Learned(steps=40).search(loose)["heavy"] == LayerBits(8, 8)
    tight = Problem(asked.options, asked.costs, {"size": 4.0}, bank=asked.bank, batches=asked.batches)
    assert set(Learned(steps=10).search(tight).values()) == {LayerBits(2, 8)}


def test_the_budget_is_spent_although_the_mixtures_lose_next_to_nothing() -> None:
    """The network adapts to its mixtures; yet an allocation below the budget gains nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10)).eval()
    model[3].weight.data *= 30  # sure of its answers
    images = torch.randn(64, 1, 4, 4)
    labels = model(images).argmax(1)
    bank = make_bank(model, find_layers(model, images[:2]), RECIPE, Widths((2, 3, 8), (8,)), [images])
    options = {name: tuple(LayerBits(bits, 8) for bits in (2, 3, 8)) for name in ("1", "3")}
    table = CostTable("bytes", 0.0, {name: {bits: float(bits.weight) for bits in of} for name, of in options.items()})
    batches = [Batch(images, labels, torch.arange(64))]
    asked = Problem(options, {"size": table}, {"size": 6.0}, bank=bank, batches=batches)
    found = Learned(steps=200, weight_lr=1e-3).search(asked)
    assert set(found.values()) == {LayerBits(3, 8)}


def test_without_a_model_it_is_refused() -> None:
    with pytest.raises(ValueError, match="Learned: needs a model and images"):
        Learned().search(random_problem(0))


def test_images_without_labels_teach_nothing() -> None:
    asked = problem()
    hidden = [batch._replace(target=torch.full_like(batch.target, NO_LABEL)) for batch in asked.batches]
    with pytest.raises(ValueError, match=r"Learned: needs labels, and data\.labeled hides those of all images"):
        Learned(steps=2).search(replace(asked, batches=hidden))
    some = replace(asked, batches=[*hidden, *asked.batches])
    assert Learned(steps=40).search(some) == Learned(steps=40).search(asked), "batches without any label are left out"


def test_a_loss_that_is_no_number_ends_the_search() -> None:
    asked = problem()
    broken = [batch._replace(image=batch.image * float("nan")) for batch in asked.batches]
    with pytest.raises(ValueError, match="Learned: the loss or its gradient is not finite at step 0"):
        Learned(steps=2).search(replace(asked, batches=broken))
