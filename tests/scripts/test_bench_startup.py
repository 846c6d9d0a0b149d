"""What a process costs is its own and that of its children; a case that fails is no measurement."""

from __future__ import annotations

from types import ModuleType

import pytest

from tests.helpers.script import load_script


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return load_script("bench_startup")


def test_a_command_that_answers_costs_something(bench: ModuleType) -> None:
    assert bench.processor_s("help") > 0


def test_a_command_that_does_not_end_as_it_should_is_no_measurement(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(bench.CASES, "typo", "--help")
    with pytest.raises(ValueError, match="typo ended with 0"):
        bench.processor_s("typo")


def test_no_round_is_refused(bench: ModuleType) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--rounds", "0"])
