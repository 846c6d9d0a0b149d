"""What lies between Ray and a search, without Ray's loop: duplicates, refused configs, and going on after a kill."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from qtrain.sweep.proposals import Proposals
from qtrain.sweep.search_log import SEARCH, Event, SearchLog, spent_s
from qtrain.sweep.searcher import NO_MORE, SpaceSearcher
from qtrain.sweep.trial import Trial
from qtrain.utils.errors import ConfigError


class Listed(SpaceSearcher):
    """Proposes ``points`` one after the other; each next one is raised by the sum of what it was told."""

    def __init__(self, points: list[int]) -> None:
        self.points = list(points)
        self.sum = 0.0
        self.told: list[tuple[str, Any]] = []
        self.seen: dict[str, dict[str, Any]] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if not self.points:
            return NO_MORE
        self.seen[trial_id] = {"x": self.points.pop(0) + self.sum}
        return self.seen[trial_id]

    def overrides(self, trial_id: str) -> list[str]:
        return [f"x={self.seen[trial_id]['x']:g}"]

    def parent(self, trial_id: str) -> str | None:
        return None

    def on_trial_result(self, trial_id: str, metrics: Mapping[str, float]) -> None:
        self.told.append((trial_id, ("epoch", metrics["epochs"])))

    def on_trial_complete(self, trial_id: str, metrics: Mapping[str, float] | None = None, error: bool = False) -> None:
        assert error == (metrics is None)
        self.told.append((trial_id, None if metrics is None else metrics["top1"]))
        self.sum += 0 if metrics is None else metrics["top1"]


def compose(changes: list[str]) -> tuple[str, list[str]]:
    if changes == ["x=13"]:
        raise ConfigError("x: 13 is refused")
    return f"key-{changes[0]}", ["base=1", *changes]


class Sweep:
    """A command: its search_log in ``folder``, and what it recorded."""

    def __init__(self, folder: Path, points: list[int], ended: dict[str, Trial] | None = None, **options: Any) -> None:
        self.search = Listed(points)
        self.ended = dict(ended or {})
        self.proposals = Proposals(
            self.search,
            compose=compose,
            search_log=SearchLog(folder),
            ended=self.ended,
            record=lambda trial: self.ended.__setitem__(trial.id, trial),
            **{"trials": 10, **options},
        )

    def ask(self, name: str) -> Any:
        found = self.proposals.suggest(name)
        return found["proposal"] if isinstance(found, dict) else found

    def end(self, name: str, top1: float) -> None:
        self.proposals.on_trial_complete(name, {"metrics/top1": top1, "status": "finished", "pid": 7})
        proposal = self.proposals.proposals[self.proposals.ids[name]]
        self.ended[proposal.id] = Trial(id=proposal.id, key=proposal.key, status="finished", metrics={"top1": top1})


def test_a_config_that_was_run_is_told_and_not_run(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, [1, 0, 5])
    assert sweep.ask("a")["overrides"] == ["base=1", "x=1"]
    sweep.end("a", 1.0)
    # 0 + 1 is the first's config once more; the next is 5 + 1 + 1, since the search learns of the duplicate too.
    assert sweep.ask("b") == {"id": "0003", "key": "key-x=7", "overrides": ["base=1", "x=7"], "knobs": {"x": 7.0}, "parent": None}  # fmt: skip  # noqa: E501
    assert sweep.search.told == [("0001", 1.0), ("0002", 1.0)]
    twin = sweep.ended["0002"]
    assert (twin.status, twin.of, twin.key, twin.metrics) == ("duplicate", "0001", "key-x=1", {"top1": 1.0})
    assert sweep.ask("c") == NO_MORE


def test_a_duplicate_of_a_trial_that_still_runs_is_told_when_that_ends(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, [1, 1, 2])
    assert sweep.ask("a")["id"] == "0001"
    assert sweep.ask("b")["id"] == "0003"
    assert sweep.search.told == [] and sweep.ended["0002"].metrics == {}
    sweep.end("a", 4.0)
    assert sweep.search.told == [("0001", 4.0), ("0002", 4.0)]
    assert sweep.ended["0002"].metrics == {"top1": 4.0}


def test_knobs_that_make_no_config_are_a_failed_trial(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, [13, 2])
    assert sweep.ask("a")["id"] == "0002"
    assert (sweep.ended["0001"].status, sweep.ended["0001"].reason) == ("failed", "x: 13 is refused")
    assert sweep.search.told == [("0001", None)]


def test_no_more_trials_than_asked_for_nor_at_once(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, [1, 2, 3, 4], trials=3, parallel=1)
    assert sweep.ask("a")["id"] == "0001"
    assert sweep.ask("b") is None, "one runs"
    sweep.end("a", 0.0)
    assert sweep.ask("b")["id"] == "0002"
    # While it runs, the next one is prepared.
    sweep.proposals.on_trial_result("b", {"metrics/top1": 1.0, "metrics/epochs": 1.0})
    assert "0003" in sweep.proposals.proposals
    sweep.end("b", 0.0)
    assert sweep.ask("c")["id"] == "0003"
    sweep.end("c", 0.0)
    assert sweep.ask("d") == NO_MORE


@pytest.mark.parametrize("cut", [0, 1, 9])
def test_a_killed_command_is_taken_up_where_it_was(tmp_path: Path, cut: int) -> None:
    points = [1, 2, 3, 4, 5]
    whole = Sweep(tmp_path / "whole", points)
    expected = []
    for name in "abcde":
        expected.append(whole.ask(name))
        whole.proposals.on_trial_result(name, {"metrics/top1": 0.5, "metrics/epochs": 1.0})
        whole.end(name, 1.0)

    first = Sweep(tmp_path / "cut", points)
    for name in "ab":
        assert first.ask(name) == expected["ab".index(name)]
        first.proposals.on_trial_result(name, {"metrics/top1": 0.5, "metrics/epochs": 1.0})
        first.end(name, 1.0)
    running = first.ask("c")
    path = tmp_path / "cut" / SEARCH
    path.write_bytes(path.read_bytes() + b'{"kind": "told", "id": "0003"'[:cut])

    second = Sweep(tmp_path / "cut", points, first.ended)
    assert second.ask("x") == running == expected[2], "what ran goes on, under its own id"
    for name, then in (("x", expected[3]), ("y", expected[4]), ("z", NO_MORE)):
        second.proposals.on_trial_result(name, {"metrics/top1": 0.5, "metrics/epochs": 1.0})
        second.end(name, 1.0)
        assert second.ask(chr(ord(name) + 1)) == then
    tells = [(id, told) for id, told in second.search.told if not isinstance(told, tuple)]
    assert tells == [(f"{n:04d}", 1.0) for n in range(1, 6)]
    assert ("0001", ("epoch", 1.0)) in second.search.told


def test_a_trial_that_was_stopped_with_its_command_runs_and_counts_again(tmp_path: Path) -> None:
    """Its end is in the books, for the table; the search was not told of it."""
    Sweep(tmp_path, [1, 2]).ask("a")
    stopped = Trial(id="0001", key="key-x=1", status="stopped", reason="by SIGTERM", metrics={"top1": 0.5})
    sweep = Sweep(tmp_path, [1, 2], {"0001": stopped}, parallel=1)
    assert sweep.ask("x")["id"] == "0001"
    assert sweep.ask("y") is None, "it runs"
    sweep.end("x", 0.0)
    assert sweep.search.told == [("0001", 0.0)]
    assert sweep.ask("y")["id"] == "0002"


def test_a_search_that_proposes_otherwise_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = Sweep(tmp_path, [1, 2])
    first.ask("a")
    first.end("a", 0.0)
    Sweep(tmp_path, [7, 8], first.ended)
    assert "the search proposes other knobs than before" in caplog.text


def test_only_the_time_that_commands_ran_is_spent() -> None:
    kinds = [("begin", 10), ("asked", 12), ("told", 15), ("begin", 100), ("begin", 200), ("mark", 204)]
    assert spent_s([Event(kind=kind, time=time) for kind, time in kinds]) == 5 + 0 + 4  # type: ignore[arg-type]


def test_each_event_is_a_line_of_json(tmp_path: Path) -> None:
    SearchLog(tmp_path).write(Event(kind="asked", id="0001", knobs={"lr": 0.1}))
    lines = [json.loads(line) for line in (tmp_path / SEARCH).read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["begin", "asked"]
