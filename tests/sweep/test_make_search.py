"""From `sweep:` to a searcher and a scheduler: what they propose and stop, that they repeat it, and mistakes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from math import log10
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler

from qtrain.config.compose import compose
from qtrain.settings.run_settings import RunSettings
from qtrain.sweep.bit_widths import BitWidths
from qtrain.sweep.knobs import Choice, IntegerRange, LogUniformRange, UniformRange
from qtrain.sweep.make_search import check_sweep, make_scheduler, make_searcher
from qtrain.sweep.searcher import NO_MORE, SpaceSearcher
from qtrain.sweep.space import Point, Space
from qtrain.utils.errors import ConfigError
from tests.helpers.changed import changed

WAYS = ["random", "grid", "tpe", "nsga2", "local", "population"]
LAYERS = ["conv1", *(f"layer{stage}.0.conv{n}" for stage in (1, 2, 3) for n in (1, 2)), "fc"]


def space() -> Space:
    return Space(
        {
            "widths": BitWidths(choices=[2, 3, 4]),
            "objective": Choice(options=["soft", "hard"]),
            "distill.temperature": UniformRange(low=1, high=8, when={"objective": ["soft"]}),
            "optimizer.lr": LogUniformRange(low=1e-4, high=1e-1),
            "epochs": IntegerRange(low=1, high=9, key="fit.epochs"),
        },
        layers=LAYERS,
    )


def config(*overrides: str, **values: Any) -> RunSettings:
    """The config of ``overrides``, which are composed once, with some ``values`` of ``sweep`` changed afterwards."""
    return changed(_composed(overrides), {f"sweep.{key}": value for key, value in values.items()})


@cache
def _composed(overrides: tuple[str, ...]) -> RunSettings:
    return compose(["task=sweep", "seed=3", "fit.epochs=4", "sweep.trials=24", *overrides])


def metrics(point: Point) -> dict[str, float]:
    """Known at once: accuracy rises with bits, with softened outputs, and toward a rate of 0.01; size with bits."""
    bits = [value for name, value in point.items() if name.startswith("widths")]
    rate = abs(point["optimizer.lr"] - 0.01) / 0.1
    return {"top1": sum(bits) + 2.0 * (point["objective"] == "soft") - rate, "size_bytes": float(sum(bits))}


def conducted(searcher: SpaceSearcher, count: int, failing: Callable[[int], bool] = lambda n: False) -> list[Point]:
    """``count`` trials, two at a time, the later of each two told first."""
    points: list[Point] = []
    open_: list[str] = []
    while len(points) < count:
        point = searcher.suggest(id := f"{len(points):04d}")
        if point == NO_MORE:
            break
        if isinstance(point, dict):
            points.append(point)
            open_.append(id)
        if point is None or len(open_) == 2:
            for done in reversed(open_):
                searcher.on_trial_result(done, {"top1": 1.0, "epochs": 1.0})
                if failing(int(done)):
                    searcher.on_trial_complete(done, None, error=True)
                else:
                    searcher.on_trial_complete(done, metrics(points[int(done)]))
            open_ = []
    return points


@pytest.mark.parametrize("way", WAYS)
def test_every_way_keeps_to_the_space_and_repeats_itself(way: str) -> None:
    cfg = config(f"search@sweep.search={way}")
    runs = [conducted(make_searcher(cfg, space()), 24, failing=lambda n: n % 5 == 3) for _ in range(2)]
    assert runs[0] == runs[1], "asked and told the same, it proposes the same"
    assert len(runs[0]) == 24
    parameters = space().parameters
    for point in runs[0]:
        assert ("distill.temperature" in point) == (point["objective"] == "soft")
        for name, value in point.items():
            if name != "generation":
                parameters[name].check(value)
    assert len({str(point) for point in runs[0]}) > 12
    other = replace(cfg, seed=4)
    assert conducted(make_searcher(other, space()), 24) != runs[0]


@pytest.mark.parametrize("way", WAYS)
def test_a_start_comes_first_and_the_search_completes_it(way: str) -> None:
    start = [{"widths": 4, "objective": "hard"}, {"widths": {"layer2.0": 2}, "optimizer.lr": 0.1}]
    cfg = config(f"search@sweep.search={way}", start=start)
    first, second = conducted(make_searcher(cfg, space()), 2)
    assert first["objective"] == "hard"
    assert [first[f"widths.layer{n}.0"] for n in (1, 2, 3)] == [4, 4, 4]
    assert (second["widths.layer2.0"], second["optimizer.lr"]) == (2, 0.1)


@pytest.mark.parametrize("way", ["tpe", "nsga2", "local", "population"])
def test_ways_that_learn_reach_more_than_chance(way: str) -> None:
    """One right width for each of six layers and a rate: what the best of 80 trials lacks, over three seeds."""
    right = dict(zip([f"widths.{layer}" for layer in LAYERS[1:-1]], [2, 4, 3, 4, 2, 3], strict=True))
    layers = Space(
        {"widths": BitWidths(choices=[2, 3, 4], per="layer"), "optimizer.lr": LogUniformRange(low=1e-4, high=1e-1)},
        layers=LAYERS,
    )

    def lacking(cfg: RunSettings) -> float:
        searcher, best = make_searcher(cfg, layers), float("inf")
        for n in range(80):
            point = searcher.suggest(f"{n}")
            if not isinstance(point, dict):
                break
            wrong = sum(abs(point[name] - bits) for name, bits in right.items()) + abs(log10(point["optimizer.lr"]) + 2)
            searcher.on_trial_complete(f"{n}", {"top1": -wrong})
            best = min(best, wrong)
        return best

    found = {}
    for chosen in (way, "random"):
        cfg = config(f"search@sweep.search={chosen}", objectives={"top1": "max"})
        if way == "population" and chosen == way:
            cfg = changed(cfg, {"fit.epochs": 8, "sweep.search.size": 10})
        found[chosen] = 0.0
        for seed in range(3):
            found[chosen] += lacking(replace(cfg, seed=seed))
    assert found[way] < 0.8 * found["random"]


def test_overrides_are_those_of_the_trial() -> None:
    searcher = make_searcher(config("search@sweep.search=random"), space())
    points = {id: searcher.suggest(id) for id in ("a", "b")}
    for id, point in points.items():
        assert isinstance(point, dict)
        assert searcher.overrides(id) == space().overrides(point)
        assert searcher.parent(id) is None


def test_metrics_that_are_not_finite_are_a_failure() -> None:
    """They would spoil what the search learns; both searchers are told the same otherwise."""
    runs = []
    for bad in ({"top1": float("nan"), "size_bytes": 1.0}, {"size_bytes": 1.0}, None):
        searcher = make_searcher(config("search@sweep.search=tpe"), space())
        points = [searcher.suggest(f"{n}") for n in range(12)]
        for n, point in enumerate(points):
            assert isinstance(point, dict)
            searcher.on_trial_complete(f"{n}", bad if n == 3 else metrics(point), error=n == 3 and bad is None)
        runs.append(searcher.suggest("next"))
    assert runs[0] == runs[1] == runs[2]


@dataclass(frozen=True)
class Told:
    """All that a scheduler looks at of a trial."""

    trial_id: str


def judged(scheduler: TrialScheduler, curves: dict[str, list[float]]) -> dict[str, int]:
    """Epochs that each trial gets, all side by side, epoch by epoch."""
    trials = {name: Told(name) for name in curves}
    for trial in trials.values():
        scheduler.on_trial_add(None, trial)  # type: ignore[arg-type]
    reached: dict[str, int] = {}
    for epoch in range(1, 1 + max(map(len, curves.values()))):
        for name, curve in curves.items():
            if reached.get(name, epoch - 1) == epoch - 1 and epoch <= len(curve):
                reached[name] = epoch
                told = {"epochs": float(epoch), "top1": curve[epoch - 1]}
                if scheduler.on_trial_result(None, trials[name], told) == TrialScheduler.STOP:  # type: ignore[arg-type]
                    reached[name] = epoch + 100
    return {name: epoch % 100 for name, epoch in reached.items()}


def test_asha_lets_one_in_so_many_go_on_at_each_rung() -> None:
    cfg = config("scheduler@sweep.scheduler=asha", "fit.epochs=9")
    scheduler = make_scheduler(cfg)
    assert scheduler is not None
    # Best first: whoever comes to a rung later is worse, and below the best third there.
    curves = {f"t{rank}": [90.0 - rank] * 9 for rank in range(9)}
    assert judged(scheduler, curves) == {"t0": 9} | {f"t{rank}": 1 for rank in range(1, 9)}
    again = make_scheduler(cfg)
    assert again is not None
    rising = {f"t{rank}": [50.0 + rank] * 9 for rank in range(9)}
    assert set(judged(again, rising).values()) == {9}, "who comes later and is better is never stopped"


def test_mo_asha_lets_the_cheap_go_on_that_asha_stops() -> None:
    """Two trials of 4 bits that are better by the point, and one of 2 bits: accuracy alone would stop the cheap one."""
    metrics = {"dear": (91.0, 100.0), "worse": (90.0, 101.0), "cheap": (80.0, 50.0), "worst": (79.0, 102.0)}
    went_on = {}
    for name in ("asha", "mo_asha"):
        scheduler = make_scheduler(
            config(f"scheduler@sweep.scheduler={name}", "sweep.scheduler.grace=1", "sweep.scheduler.reduction=2")
        )
        assert scheduler is not None
        decisions = {}
        for id, (top1, size) in metrics.items():
            scheduler.on_trial_add(None, Told(id))  # type: ignore[arg-type]
            told = {"epochs": 1.0, "top1": top1, "size_bytes": size}
            decisions[id] = scheduler.on_trial_result(None, Told(id), told)  # type: ignore[arg-type]
        went_on[name] = {id for id, decision in decisions.items() if decision == TrialScheduler.CONTINUE}
    assert went_on == {"asha": {"dear"}, "mo_asha": {"dear", "cheap"}}


def test_the_median_stops_who_is_worse_than_most() -> None:
    cfg = config("scheduler@sweep.scheduler=median", "sweep.scheduler.grace=2")
    scheduler = make_scheduler(cfg)
    assert scheduler is not None
    curves = {"a": [90.0] * 4, "b": [80.0] * 4, "c": [70.0] * 4, "bad": [10.0] * 4, "good": [85.0] * 4}
    assert judged(scheduler, curves) == {"a": 4, "b": 4, "c": 4, "bad": 2, "good": 4}


def test_costs_are_stopped_from_above() -> None:
    """The first objective may be one to be small."""
    scheduler = make_scheduler(config("scheduler@sweep.scheduler=asha", objectives={"loss": "min", "top1": "max"}))
    assert scheduler is not None
    low, high = Told("low"), Told("high")
    for trial in (low, high):
        scheduler.on_trial_add(None, trial)  # type: ignore[arg-type]
    assert scheduler.on_trial_result(None, low, {"epochs": 1.0, "loss": 0.1}) == TrialScheduler.CONTINUE  # type: ignore[arg-type]
    assert scheduler.on_trial_result(None, high, {"epochs": 1.0, "loss": 0.9}) == TrialScheduler.STOP  # type: ignore[arg-type]


def test_none_stops_nobody() -> None:
    assert make_scheduler(config()) is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"trials": 0}, r"sweep\.trials: must be at least 1, got 0"),
        ({"time_budget_s": 0}, r"sweep\.time_budget_s: must be above 0, or null, got 0"),
        ({"parallel": 0}, r"sweep\.parallel: must be at least 1, or null, got 0"),
        ({"workers": 0}, r"sweep\.workers: must be at least 1, got 0"),
        ({"max_failures": -1}, r"sweep\.max_failures: must be at least 0, got -1"),
        ({"cache_gb": -0.5}, r"sweep\.cache_gb: must be at least 0, got -0\.5"),
        ({"val_fraction": 1}, r"sweep\.val_fraction: must be in \(0, 1\), got 1"),
        ({"resources": {"cpu": 0, "gpu": 0}}, r"sweep\.resources: must be numbers of at least 0, one of them above it"),
        ({"objectives": {"top1": "up"}}, r"sweep\.objectives\.top1: must be max or min, got 'up'"),
        ({"objectives": {"top1": None}}, r"sweep\.objectives: must name a metric"),
        ({"start": [{"width": 3}]}, r"sweep\.start: there is no knob 'width' in the space; did you mean 'widths'"),
    ],
)
def test_a_value_that_cannot_be_is_said_in_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        make_searcher(config(**values), space())
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("group", "settings", "message"),
    [
        ("search=population", {"interval": 3}, r"sweep\.search: Population: fit\.epochs must be a multiple"),
        ("search=tpe", {"startup": 0}, r"sweep\.search: Tpe: startup must be at least 1, got 0"),
        ("search=nsga2", {"crossover": 2}, r"sweep\.search: Nsga2: crossover must be in \[0, 1\], got 2"),
        ("search=grid", {"points": 1}, r"sweep\.search: GridSearch: points must be at least 2"),
        ("scheduler=asha", {"grace": 5}, r"sweep\.scheduler\.grace: must be at most fit\.epochs, got 5 of 4"),
        ("scheduler=asha", {"reduction": 1}, r"sweep\.scheduler: Asha: reduction must be above 1, got 1"),
        ("scheduler=median", {"least": 0}, r"sweep\.scheduler: Median: least must be at least 1, got 0"),
    ],
)
def test_a_setting_that_cannot_be_is_said_in_one_line(group: str, settings: dict[str, Any], message: str) -> None:
    place, _, way = group.partition("=")
    given = [f"sweep.{place}.{key}={value}" for key, value in settings.items()]
    cfg = config(f"{place}@sweep.{place}={way}", *given)
    with pytest.raises(ConfigError, match=message):
        make_searcher(cfg, space())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("scheduler@sweep.scheduler=asha", r"sweep\.scheduler: a population replaces its worst by itself"),
        (
            "stages=qkd",
            r"sweep\.search: a population makes stages of its own, beside which there are none; add stages=none",
        ),
    ],
)
def test_what_a_population_does_itself_is_not_asked_for_twice(more: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_sweep(config("search@sweep.search=population", more))


def test_the_sections_as_they_stand_are_right() -> None:
    check_sweep(config())
    any_: Any = make_searcher(config("search@sweep.search=grid"), Space({"seed": Choice(options=[1, 2])}))
    assert any_.trials == 2
