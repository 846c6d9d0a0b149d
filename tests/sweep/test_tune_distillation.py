"""The experiments that find temperature and weight of distillation: their spaces, and what each point trains."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from qtrain.config.compose import compose
from qtrain.data.base import VisionData
from qtrain.pipeline.load_data import load_data
from qtrain.settings.run_identity import recorded
from qtrain.settings.run_settings import RunSettings
from qtrain.sweep.initial_trials import is_start
from qtrain.sweep.make_search import check_sweep, make_searcher
from qtrain.sweep.make_space import make_space, rehearse_space
from qtrain.sweep.searcher import NO_MORE
from qtrain.sweep.space import Point, Space

EXPERIMENTS = ["tune_quickstart", pytest.param("cifar10/tune_distillation", marks=pytest.mark.slow)]


@cache
def composed(experiment: str, *more: str) -> RunSettings:
    return compose([f"+experiment={experiment}", "task=sweep", *more])


@cache
def digits() -> VisionData:
    return load_data(compose(["data.max_train=64"]))


def space_of(experiment: str) -> Space:
    return make_space(composed(experiment), digits())


@cache
def points(experiment: str) -> list[Point]:
    """All points that the sweep proposes, in its order."""
    searcher = make_searcher(composed(experiment), space_of(experiment))
    found: list[Point] = []
    while True:
        point = searcher.suggest(id := f"{len(found) + 1:04d}")
        if point == NO_MORE:
            return found
        assert isinstance(point, dict)
        found.append(point)
        searcher.on_trial_complete(id, {"top1": 0.0, "size_bytes": 1.0})


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_space_composes_into_trials(experiment: str) -> None:
    cfg = composed(experiment)
    check_sweep(cfg)
    rehearse_space(cfg, space_of(experiment), lambda changes: composed(experiment, *changes))
    assert space_of(experiment).count(1) == cfg.sweep.trials, "the grid is tried whole"


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_each_trial_has_the_objective_of_its_knobs(experiment: str) -> None:
    space = space_of(experiment)
    objectives: set[tuple[str, str]] = set()
    for point in points(experiment):
        cfg = composed(experiment, *space.overrides(point))
        objective: dict[str, Any] = recorded(cfg.plain)["objective"]
        terms = objective["terms"]
        bits = f"w{cfg.quantize.bits.get('weight')}a{cfg.quantize.bits.get('input')}"
        assert bits == point["bits"]
        if point["share"] == "no_teacher":
            assert "temperature" not in point
            assert cfg.teacher.model is None and list(terms) == ["hard"]
        else:
            share = float(point["share"])
            assert cfg.teacher.model is not None
            assert terms["soft"]["weight"] == share
            assert terms["hard"]["weight"] == pytest.approx(1 - share)
            assert terms["soft"]["temperature"] == point["temperature"]
        objectives.add((bits, str(objective)))
    assert len(objectives) == composed(experiment).sweep.trials


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_trials_without_a_teacher_come_first_and_are_starts(experiment: str) -> None:
    cfg = composed(experiment)
    starts = list(cfg.sweep.start)
    found = points(experiment)
    assert found[:2] == starts
    assert {point["bits"] for point in found[:2]} == set(cfg.sweep.space["bits"]), "one for each width"
    assert [point for n, point in enumerate(found, start=1) if is_start(cfg, f"{n:04d}", point)] == found[:2]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_test_images_are_left_alone(experiment: str) -> None:
    cfg = composed(experiment)
    assert cfg.data.options["val_fraction"] > 0
    assert not cfg.sweep.test_front
