"""Steps of all widths learn together, with the network frozen."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from qtrain.convert.bank import Widths
from qtrain.convert.plan import LayerPlan
from qtrain.observers.min_max import MinMax
from qtrain.quantizers.codebook.kmeans import KMeans
from qtrain.quantizers.uniform.affine import Affine
from qtrain.quantizers.uniform.lsq import LSQ
from qtrain.sensitivity.limpq import Limpq


def test_without_training_the_score_is_the_calibrated_step(small_bank: Any) -> None:
    bank, batches = small_bank()
    scores = Limpq(steps=0, input_factor=2.0)(bank, batches, seed=0)
    for choice in bank.choices():
        step = float(bank.quantizers[choice.layer][choice.role][choice.bits].step().detach().mean())  # type: ignore[operator]
        found = getattr(scores, choice.role)[choice.layer][choice.bits]
        assert found == pytest.approx(step * (2.0 if choice.role == "input" else 1.0))


def test_without_a_factor_inputs_weigh_as_much_as_weights_on_average(small_bank: Any) -> None:
    bank, batches = small_bank()
    plain, even = (Limpq(steps=0, input_factor=factor)(bank, batches, seed=0) for factor in (1.0, None))
    of_weights, of_inputs, before = (
        torch.tensor([rise for widths in of.values() for rise in widths.values()], dtype=torch.float64)
        for of in (even.weight, even.input, plain.input)
    )
    assert even.weight == plain.weight
    assert float(of_inputs.mean()) == pytest.approx(float(of_weights.mean()))
    assert float(before.mean()) != pytest.approx(float(of_weights.mean()), rel=0.1)
    torch.testing.assert_close(of_inputs / of_inputs[0], before / before[0])


def test_steps_of_every_width_learn_and_stay_positive(small_bank: Any) -> None:
    bank, batches = small_bank(widths=Widths((2,), (2,)))
    start = Limpq(steps=0)(bank, batches, seed=0)
    end = Limpq(steps=40, rate=0.02)(bank, batches, seed=0)
    for before, after in ((start.weight, end.weight), (start.input, end.input)):
        assert all(before[name] != after[name] for name in before)
        assert all(value > 0 for widths in after.values() for value in widths.values())


def test_same_seed_same_steps_and_another_seed_draws_other_widths(small_bank: Any) -> None:
    bank, batches = small_bank()
    first, again, other = (Limpq(steps=5)(bank, batches, seed=seed) for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize("make", [Affine, KMeans])
def test_quantizer_without_a_learned_step_is_refused_with_the_layer(make: Any, small_bank: Any) -> None:
    recipe = LayerPlan(weight=make, input=partial(LSQ), weight_observer=MinMax, input_observer=MinMax)
    bank, batches = small_bank(recipe=recipe)
    with pytest.raises(ValueError, match=rf"Limpq: {make.__name__}, of the weight of layer 'stem', learns no step"):
        Limpq()(bank, batches, seed=0)


@pytest.mark.parametrize("options", [{"steps": -1}, {"rate": 0.0}, {"input_factor": 0.0}])
def test_options_out_of_range_are_refused(options: Any) -> None:
    with pytest.raises(ValueError, match="Limpq: steps must be 0 or more, rate and input_factor above 0"):
        Limpq(**options)


def test_nothing_of_torch_is_drawn(small_bank: Any) -> None:
    bank, batches = small_bank()
    state = torch.get_rng_state()
    Limpq(steps=2)(bank, batches, seed=0)
    assert torch.equal(state, torch.get_rng_state())
