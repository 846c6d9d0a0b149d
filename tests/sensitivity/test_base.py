"""Parts of a score survive a stop, and a score leaves everything as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qtrain.convert.layers import quantizers_of
from qtrain.sensitivity.base import Done, DoneFile, Score, scores_of
from qtrain.sensitivity.clado import Clado
from qtrain.sensitivity.fisher import Fisher
from qtrain.sensitivity.hawq_eigenvalue import HawqEigenvalue
from qtrain.sensitivity.hawq_trace import HawqTrace
from qtrain.sensitivity.limpq import Limpq
from qtrain.sensitivity.one_layer import OneLayer
from qtrain.spec import Choice

SCORES: dict[str, Score] = {
    "one_layer": OneLayer(chunk=5),
    "fisher": Fisher(chunk=5),
    "hawq_trace": HawqTrace(probes=8, chunk=5),
    "hawq_eigenvalue": HawqEigenvalue(iterations=3),
    "limpq": Limpq(steps=3, chunk=5),
    "clado": Clado(),
}


class Counting(dict[str, list[float]]):
    """Counts what is computed."""

    computed = 0

    def __setitem__(self, name: str, numbers: list[float]) -> None:
        self.computed += 1
        super().__setitem__(name, numbers)


@pytest.mark.parametrize("name", SCORES)
def test_what_is_done_is_not_computed_again(name: str, small_bank: Any, tmp_path: Path) -> None:
    bank, batches = small_bank()
    expected = SCORES[name](bank, batches, seed=0)
    first = Counting()
    assert SCORES[name](bank, batches, seed=0, done=first) == expected
    assert first.computed == len(first) >= 1
    file = DoneFile(tmp_path / "parts.jsonl")
    half = list(first)[: len(first) // 2]
    for part in half:
        file[part] = first[part]
    with file.path.open("a") as stream:
        stream.write('{"part": "killed", "num')
    second = DoneFile(file.path)
    assert list(second) == half
    assert SCORES[name](bank, batches, seed=0, done=second) == expected
    assert len(DoneFile(file.path)) == len(first)
    known: Done = Counting(first)
    assert SCORES[name](bank, batches, seed=0, done=known) == expected
    assert isinstance(known, Counting)
    assert known.computed == 0


@pytest.mark.parametrize("name", SCORES)
def test_score_leaves_the_model_and_the_quantizers_as_they_were(name: str, small_bank: Any) -> None:
    bank, batches = small_bank()
    bank.model.train()
    bank.model.get_submodule("head").bias.requires_grad_(False)
    before = {key: tensor.clone() for key, tensor in bank.model.state_dict().items()}
    states = [q.state_dict() for roles in bank.quantizers.values() for at in roles.values() for q in at.values()]
    held = [{key: tensor.clone() for key, tensor in state.items()} for state in states]
    learned = [parameter.requires_grad for parameter in bank.model.parameters()]
    SCORES[name](bank, batches, seed=0)
    assert all(module.training for module in bank.model.modules())
    assert not quantizers_of(bank.model)
    assert [parameter.requires_grad for parameter in bank.model.parameters()] == learned
    assert all(parameter.grad is None for parameter in bank.model.parameters())
    assert all(torch.equal(before[key], tensor) for key, tensor in bank.model.state_dict().items())
    assert all(torch.equal(a[key], b[key]) for a, b in zip(held, states, strict=True) for key in a)


@pytest.mark.parametrize("name", SCORES)
def test_no_images_are_refused(name: str, small_bank: Any) -> None:
    with pytest.raises(ValueError, match=r"score: no images; set quantize\.calibration_batches to 1 or more"):
        SCORES[name](small_bank()[0], [], seed=0)


@pytest.mark.parametrize("name", SCORES)
def test_tied_layers_are_scored_once(name: str, small_bank: Any) -> None:
    bank, batches = small_bank()
    scores = SCORES[name](bank, batches, seed=0)
    assert set(scores.weight) == {"stem", "depthwise", "place", "mix", "head"}
    assert set(scores.input) == {"stem", "depthwise", "place", "mix", "again", "head"}
    assert all(set(widths) == {3, 6} for side in (scores.weight, scores.input) for widths in side.values())


def test_score_that_is_not_finite_is_refused_with_the_layer() -> None:
    with pytest.raises(ValueError, match="score: that of the weight of layer 'head' at 3 bits is nan"):
        scores_of({Choice("head", "weight", 3): float("nan")})
    pair = (Choice("stem", "input", 4), Choice("head", "weight", 3))
    with pytest.raises(ValueError, match="score: that of stem input 4 beside head weight 3 is inf"):
        scores_of({}, {pair: float("inf")})
