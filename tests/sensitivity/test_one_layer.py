"""The measured rise is that of a model in which nothing else is quantized."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from qtrain.allocate.uniform import Uniform
from qtrain.convert.bank import ROLES
from qtrain.sensitivity.one_layer import OneLayer
from qtrain.spec import FULL_PRECISION, Choice, LayerBits


@pytest.mark.parametrize("measure", ["kl", "loss"])
def test_rise_is_that_of_the_model_with_one_choice(measure: Any, small_bank: Any, whole: Any) -> None:
    bank, batches = small_bank()
    scores = OneLayer(measure=measure, chunk=5)(bank, batches, seed=0)
    images, target = whole(batches)
    with torch.no_grad():
        exact = bank.model(images).double()
        for choice in bank.choices():
            bank.put_([choice])
            logits = bank.model(images).double()
            if measure == "loss":
                rise = F.cross_entropy(logits, target) - F.cross_entropy(exact, target)
            else:
                rise = F.kl_div(logits.log_softmax(1), exact.log_softmax(1), reduction="batchmean", log_target=True)
            of = {role: getattr(scores, role) for role in ROLES}[choice.role]
            assert of[choice.layer][choice.bits] == pytest.approx(float(rise), rel=1e-4, abs=1e-6)


def test_divergence_falls_with_every_bit_and_is_never_negative(small_bank: Any) -> None:
    bank, batches = small_bank()
    scores = OneLayer()(bank, batches, seed=0)
    for widths in (*scores.weight.values(), *scores.input.values()):
        assert widths[3] > widths[6] > 0


@pytest.mark.parametrize("measure", ["kl", "loss"])
def test_around_a_reference_the_rise_is_that_beside_full_precision_of_the_one_tensor(
    measure: Any, small_bank: Any, whole: Any
) -> None:
    bank, batches = small_bank()
    reference = {name: LayerBits(3, 6) for name in bank.names} | {"head": LayerBits(6, 32)}
    scores = OneLayer(measure=measure, chunk=5, reference=lambda names: reference)(bank, batches, seed=0)
    images, target = whole(batches)
    slots = dict.fromkeys((c.layer, c.role) for c in bank.choices())

    def distance(of: dict[tuple[str, str], int]) -> float:
        bank.put_(Choice(layer, role, of[layer, role]) for layer, role in slots)
        logits = bank.model(images).double()
        if measure == "loss":
            return float(F.cross_entropy(logits, target))
        return float(F.kl_div(logits.log_softmax(1), exact.log_softmax(1), reduction="batchmean", log_target=True))

    with torch.no_grad():
        bank.put_([])
        exact = bank.model(images).double()
        others = {(layer, role): getattr(reference[layer], role) for layer, role in slots}
        for choice in bank.choices():
            slot = (choice.layer, choice.role)
            rise = distance({**others, slot: choice.bits}) - distance({**others, slot: FULL_PRECISION})
            assert getattr(scores, choice.role)[choice.layer][choice.bits] == pytest.approx(rise, rel=1e-4, abs=1e-6)


def test_a_reference_takes_up_where_it_was_stopped(small_bank: Any) -> None:
    bank, batches = small_bank()
    score = OneLayer(reference=Uniform(weight=3, input=3))
    done: dict[str, list[float]] = {}
    scores = score(bank, batches, seed=0, done=done)
    assert len(done) == len([*bank.choices()]) + 1, "one more than without: the reference's own, once for all"
    assert score(bank, batches, seed=0, done=dict(done)) == scores


def test_bits_of_a_reference_that_the_bank_lacks_are_refused(small_bank: Any) -> None:
    bank, batches = small_bank()
    message = "OneLayer: reference has 4 bits for the weight of layer 'stem', .* add 4 to allocate.weight"
    with pytest.raises(ValueError, match=message):
        OneLayer(reference=Uniform(weight=4, input=3))(bank, batches, seed=0)


def test_measure_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="OneLayer: measure must be kl or loss, got 'mse'"):
        OneLayer(measure="mse")  # type: ignore[arg-type]
