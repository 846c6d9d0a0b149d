"""Times of cases in turns, and their ratios. No assertion on time."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from tests.helpers.script import load_script


@pytest.fixture(scope="module")
def harness() -> ModuleType:
    return load_script("bench_harness")


def test_ratios_are_medians_of_rounds_in_one_mode(harness: ModuleType) -> None:
    full = harness.Measured("full precision", True, ms=[10.0, 10.0, 20.0])
    slow = harness.Measured("student", False, ("full precision",), ms=[99.0])
    student = harness.Measured("student", True, ("full precision",), ms=[11.0, 12.0, 22.0])
    teacher = harness.Measured("teacher forward", True, ms=[1.0, 8.0, 3.0])
    both = harness.Measured("student with teacher", True, ("student", "teacher forward"), ms=[24.0, 20.0, 25.0])
    results = [full, slow, student, teacher, both]
    assert harness.ratio(student, results) == pytest.approx(1.1)
    assert harness.ratios(student, results) == pytest.approx([1.1, 1.2, 1.1])
    assert harness.ratio(both, results) == pytest.approx(1.0)
    assert [harness.ratio(one, results) for one in (full, slow, teacher)] == [None] * 3


def test_an_eager_case_can_be_held_against_compiled_full_precision(harness: ModuleType) -> None:
    full = [harness.Measured("full precision", compiled, ms=[ms]) for compiled, ms in ((False, 5.0), (True, 2.0))]
    peer = harness.Measured("peer", False, ("full precision",), base_compiled=True, ms=[6.0])
    assert harness.ratio(peer, [*full, peer]) == pytest.approx(3.0)
    assert "3.000 of full precision, compiled" in harness.table([*full, peer])


def test_quartiles(harness: ModuleType) -> None:
    assert harness.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 4.0)
    assert harness.quartiles([7.0]) == (7.0, 7.0)


def test_cases_take_turns_to_and_fro(harness: ModuleType) -> None:
    seen: list[str] = []
    cases = [
        (harness.Measured(name, False), harness.Work(lambda name=name: seen.append(name), ())) for name in ("a", "b")
    ]
    harness.measure(cases, device=torch.device("cpu"), rounds=2, steps=2, warmup=1)
    # The first step, warm-up and the count of bytes, then in each round one step before the two that are timed.
    assert "".join(seen) == "aaabbb" + "aaabbb" + "bbbaaa"
    assert all(measured.first_s > 0 for measured, _ in cases)
    assert all(len(measured.ms) == 2 for measured, _ in cases)


def test_first_steps_are_compared_in_one_mode(harness: ModuleType) -> None:
    full = [harness.Measured("full precision", compiled, ms=[1.0], first_s=s) for compiled, s in ((0, 1.0), (1, 20.0))]
    student = harness.Measured("student", True, ms=[1.0], first_s=30.0)
    assert harness.first_ratio(student, [*full, student]) == 1.5
    assert harness.first_ratio(full[1], full) is None
    assert harness.columns(student, [*full, student])["first_ratio"] == 1.5


def test_saved_bytes_leave_out_what_is_in_memory_anyway(harness: ModuleType) -> None:
    weight = torch.ones(8, requires_grad=True)
    batch = torch.ones(4, 8)

    def run() -> None:
        ((batch * weight) ** 2).sum().backward()

    known = harness.Measured("full precision", False, ms=[1.0])
    known.saved = harness.saved_bytes(harness.Work(run, [weight, batch]))
    assert known.saved == 4 * 8 * 4, "the product, whose square needs it"
    double = harness.Measured("student", False, ms=[1.0], saved=2 * known.saved)
    assert harness.saved_ratio(double, [known, double]) == 2.0 and harness.saved_ratio(known, [known]) is None
