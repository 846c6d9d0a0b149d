"""The width of a student of many bits, chosen by name or by a budget."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import qtrain
from qtrain.nn.many_bits import ManyBits
from tests.helpers.many_bits import images, labels, many_bits, network


@pytest.fixture
def student() -> ManyBits:
    return many_bits()


def bops(student: ManyBits, bits: int) -> float:
    return qtrain.cost(student.at(bits), images()).bops


def test_a_budget_takes_the_widest_that_it_allows(student: ManyBits) -> None:
    for bits in (8, 4, 2):
        assert qtrain.set_bits(student, budget={"bops": bops(student, bits)}, images=images()) == bits
        assert student.bits == bits
    assert qtrain.set_bits(student, budget={"bops": bops(student, 4) - 1}, images=images()) == 2


def test_all_costs_of_a_budget_count(student: ManyBits) -> None:
    measured = {8: {"latency_ms": 3.0}, 4: {"latency_ms": 2.0}, 2: {"latency_ms": 1.0}}
    assert qtrain.set_bits(student, budget={"latency_ms": 2.5}, measured=measured) == 4
    both = {"latency_ms": 2.5, "bops": bops(student, 2)}
    assert qtrain.set_bits(student, budget=both, measured=measured, images=images()) == 2


def test_a_budget_has_units_or_is_a_part_of_what_the_widest_costs(student: ManyBits) -> None:
    of_four = bops(student, 4)
    assert qtrain.set_bits(student, budget={"bops": f"{1.001 * of_four / 1000} k"}, images=images()) == 4
    assert qtrain.set_bits(student, budget={"bops": "100%"}, images=images()) == 8
    assert qtrain.set_bits(student, budget={"bops": f"{100.1 * of_four / bops(student, 8)}%"}, images=images()) == 4
    with pytest.raises(ValueError, match=r"budgets\.bops: must be a number of bit operations such as .* got 'some'"):
        qtrain.set_bits(student, budget={"bops": "some"}, images=images())


def test_an_impossible_budget_names_the_cheapest_width(student: ManyBits) -> None:
    with pytest.raises(ValueError, match=r"^set_bits: no width is within the budget; the cheapest, 2 bits, has bops "):
        qtrain.set_bits(student, budget={"bops": 1}, images=images())
    assert student.bits == 8


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "give bits, or a budget, and not both"),
        ({"bits": 4, "budget": {"bops": 1}}, "give bits, or a budget, and not both"),
        ({"budget": {"bops": 1}}, "bops of 8 bits is not known; give images="),
        ({"budget": {"joule": 1}}, r"joule of 8 bits is not known; give measured=\{8: \{'joule': \.\.\.\}\}"),
        ({"bits": 3}, "this student has 8, 4, 2 bits, not 3"),
    ],
)
def test_a_wrong_choice_ends_in_one_line(student: ManyBits, given: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says) as error:
        qtrain.set_bits(student, **given)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_a_student_of_one_width_says_how_to_make_one_of_several() -> None:
    with pytest.raises(ValueError, match=r"^set_bits: a Sequential has one width only; many_bits\.widths"):
        qtrain.set_bits(qtrain.quantize(network(), images()), 4)


def test_description_and_cost_are_those_of_the_width_in_use(student: ManyBits) -> None:
    qtrain.set_bits(student, 2)
    assert qtrain.describe(student).layers == {"0": (8, 8), "3": (2, 2), "7": (8, 8)}
    assert qtrain.cost(student, images()).bops == bops(student, 2)


def test_distillation_trains_all_widths(student: ManyBits) -> None:
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    loader = DataLoader(TensorDataset(images(), labels()), batch_size=4)
    qtrain.distill(student, loader, epochs=1, options=["trainer=cpu"])
    after = student.state_dict()
    for name in ("w8.3.weight", "w2.1.running_mean", "w4.4.weight", "w2.3.weight_quantizer.inner.scale"):
        assert not torch.equal(after[name], before[name]), name
    assert torch.equal(after["w2.3.weight"], after["w8.3.weight"])


def test_the_width_in_use_is_exported(student: ManyBits, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    qtrain.set_bits(student, 2)
    assert qtrain.export(student, tmp_path / "two.onnx", images()).passed
    assert qtrain.verify(student, tmp_path / "two.onnx", images()).passed
    qtrain.set_bits(student, 8)
    assert not qtrain.verify(student, tmp_path / "two.onnx", images()).passed


@pytest.mark.parametrize("bits", [4.0, "4", True])
def test_bits_are_whole_numbers(bits: object) -> None:
    with pytest.raises(ValueError, match=r"this student has 8, 4, 2 bits, not "):
        qtrain.set_bits(many_bits(), bits)  # type: ignore[arg-type]
