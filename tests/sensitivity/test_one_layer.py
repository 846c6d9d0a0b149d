"""The measured rise is that of a model in which nothing else is quantized."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from qtrain.convert.bank import ROLES
from qtrain.sensitivity.one_layer import OneLayer


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


def test_measure_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="OneLayer: measure must be kl or loss, got 'mse'"):
        OneLayer(measure="mse")  # type: ignore[arg-type]
