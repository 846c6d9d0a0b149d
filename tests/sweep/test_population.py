"""A population: who gives way to whom, what changes, and that it is a function of seed and metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from qtrain.sweep.bit_widths import BitWidths
from qtrain.sweep.domains import Options
from qtrain.sweep.knobs import Choice, UniformRange
from qtrain.sweep.pareto import Direction
from qtrain.sweep.population import GENERATION, PopulationSearcher
from qtrain.sweep.search import Population
from qtrain.sweep.searcher import NO_MORE
from qtrain.sweep.space import Point, Space

LAYERS = ["conv1", *(f"layer{i}.0.conv{j}" for i in (1, 2, 3, 4) for j in (1, 2)), "fc"]
SCHEDULE = {"_target_": "qtrain.schedules.cosine.Cosine", "start": 1.0, "end": 0.0}
BOTH: dict[str, Direction] = {"top1": "max", "size_bytes": "min"}
Figures = Callable[[str, Point], dict[str, float] | None]


def space() -> Space:
    return Space(
        {
            "widths": BitWidths(choices=[2, 3, 4, 8]),
            "objective": Choice(options=["soft", "hard"]),
            "distill.temperature": UniformRange(low=1, high=8, when={"objective": ["soft"]}),
        },
        layers=LAYERS,
    )


def population(epochs: int = 6, objectives: Mapping[str, Direction] = BOTH, **settings: Any) -> PopulationSearcher:
    return PopulationSearcher(
        space(),
        Population(**{"size": 8, "interval": 2, **settings}),
        objectives=objectives,
        seed=0,
        epochs=epochs,
        lr_schedule=SCHEDULE,
        start=[{"widths": 8, "objective": "hard"}],
    )


def value(override: str) -> Any:
    """What Hydra reads to the right of the ``=``."""
    return OverridesParser.create().parse_override(override).value()


def bits(point: Point) -> float:
    return float(sum(value for name, value in point.items() if name.startswith("widths")))


def run(
    searcher: PopulationSearcher, metrics: Figures, told: Callable[[list[str]], list[str]] = list
) -> dict[str, Point]:
    """All trials of a population, told of in the order that ``told`` makes of each generation."""
    points: dict[str, Point] = {}
    waiting: list[str] = []
    while (point := searcher.suggest(id := f"t{len(points):02d}")) != NO_MORE:
        if point is None:
            for done in told(waiting):
                searcher.on_trial_complete(done, found := metrics(done, points[done]), error=found is None)
            waiting = []
            continue
        assert isinstance(point, dict)
        points[id] = point
        waiting.append(id)
        if len(waiting) == 8:  # a generation waits for all of the one before
            assert searcher.suggest("none") is None
    return points


def wide_is_good(id: str, point: Point) -> dict[str, float]:
    return {"top1": bits(point), "size_bytes": 1.0}


def test_each_generation_is_a_trial_of_each_student() -> None:
    searcher = population()
    points = run(searcher, wide_is_good)
    assert len(points) == searcher.trials == 8 * 3
    assert [point[GENERATION] for point in points.values()] == [1] * 8 + [2] * 8 + [3] * 8
    assert points["t00"] | {GENERATION: 1} == points["t00"]
    assert {points["t00"][f"widths.layer{i}.0"] for i in (1, 2, 3, 4)} == {8}, "the first starts as it was told"
    assert searcher.parent("t00") is None


def test_the_worst_go_on_from_the_best_with_other_knobs_and_the_rest_as_they_are() -> None:
    searcher = population(objectives={"top1": "max"})
    points = run(searcher, wide_is_good)
    first = sorted(list(points)[:8], key=lambda id: -bits(points[id]))
    best, worst = first[:2], first[-2:]
    for before, after in zip(list(points)[:8], list(points)[8:16], strict=True):
        parent = searcher.parent(after)
        changed = {k: v for k, v in points[after].items() if k != GENERATION and points[parent].get(k) != v}  # type: ignore[index]
        if before in worst:
            assert parent in best
            assert changed
        else:
            assert (parent, changed) == (before, {})
    reached = [sum(bits(point) for point in list(points.values())[n : n + 8]) for n in (0, 8, 16)]
    assert reached == sorted(reached), "what is good spreads"


def test_the_line_of_a_student_is_the_stages_of_its_run() -> None:
    searcher = population()
    points = run(searcher, wide_is_good)
    last = searcher.overrides("t23")
    assert searcher.overrides(str(searcher.parent("t23"))) == last[:-1], "all but the last stage are the parent's"
    assert [override.partition("=")[0] for override in last] == ["+stages.g1", "+stages.g2", "+stages.g3"]
    stages = [value(override) for override in last]
    windows = []
    for number, own in enumerate(stages, start=1):
        assert "fit.epochs=2" in own
        assert ("fit.carry_optimizer=true" in own) == (number > 1)
        window = value(own[-1])
        assert window["schedule"] == SCHEDULE
        windows.append((window["begin"], window["finish"]))
    assert windows == [(0, 1 / 3), (1 / 3, 2 / 3), (2 / 3, 1)]
    knobs = space().overrides(points["t23"])
    assert stages[-1][: len(knobs)] == knobs


def test_it_is_a_function_of_seed_and_metrics_and_not_of_who_is_first() -> None:
    orders: list[Callable[[list[str]], list[str]]] = [list, lambda ids: ids[::-1], lambda ids: ids[3:] + ids[:3]]
    runs = []
    for order in orders:
        searcher = population()
        points = run(searcher, lambda id, point: {"top1": bits(point) % 7, "size_bytes": bits(point)}, told=order)
        runs.append([(point, searcher.parent(id)) for id, point in points.items()])
    assert runs[0] == runs[1] == runs[2]


def test_conditions_hold_in_what_was_changed() -> None:
    points = run(population(epochs=20, change=0.5, resample=0.5), wide_is_good)
    domain = space().parameters["widths.layer1.0"]
    assert isinstance(domain, Options)
    assert len(points) == 80
    for point in points.values():
        assert ("distill.temperature" in point) == (point["objective"] == "soft")
        assert 1 <= point.get("distill.temperature", 1) <= 8
        assert point["widths.layer1.0"] in domain.values
    assert len({point["objective"] for point in points.values()}) == 2


def test_with_several_objectives_no_end_of_the_front_gives_way() -> None:
    """Accuracy and size both grow with bits: all students are of the front, and its ends are the loneliest."""
    searcher = population()
    points = run(searcher, lambda id, point: {"top1": bits(point), "size_bytes": bits(point)})
    for generation in range(2):
        here = list(points)[8 * generation : 8 * generation + 8]
        sizes = {id: bits(points[id]) for id in here}
        stayed = {searcher.parent(id) for id in list(points)[8 * generation + 8 : 8 * generation + 16]}
        assert {sizes[id] for id in stayed if id} >= {min(sizes.values()), max(sizes.values())}


def test_who_failed_gives_way_and_nobody_goes_on_from_it() -> None:
    broken = {"t01", "t04", "t05", "t06"}
    searcher = population()
    points = run(searcher, lambda id, point: None if id in broken else wide_is_good(id, point))
    assert len(points) == 24
    assert not broken & {searcher.parent(id) for id in points}
    nobody = population()
    assert len(run(nobody, lambda id, point: {"top1": float("nan"), "size_bytes": 1.0})) == 8, "all failed: it is over"


@pytest.mark.parametrize(("broken", "give_way"), [([], 2), (["t03"], 2), (["t01", "t04", "t05"], 3)])
def test_no_more_than_the_quantile_give_way_unless_more_failed(broken: list[str], give_way: int) -> None:
    """A quarter of eight; those that failed are among them, and not beside them."""
    searcher = population()
    points = run(searcher, lambda id, point: None if id in broken else {"top1": bits(point) + int(id[1:]) / 99,
                                                                       "size_bytes": 1.0})  # fmt: skip
    pairs = zip(list(points)[:8], list(points)[8:16], strict=True)
    assert sum(searcher.parent(after) != before for before, after in pairs) == give_way


def test_epochs_that_are_no_multiple_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Population: fit\.epochs must be a multiple of interval, got 7 and 2"):
        population(epochs=7)
    with pytest.raises(ValueError, match="a knob must not be called 'generation'"):
        PopulationSearcher(
            Space({GENERATION: Choice(options=[1])}),
            Population(),
            objectives=BOTH,
            seed=0,
            epochs=2,
            lr_schedule=SCHEDULE,
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 1}, "Population: size must be at least 2, got 1"),
        ({"interval": 0}, "interval must be at least 1"),
        ({"quantile": 0.6}, r"quantile must be in \(0, 0.5\], got 0.6"),
        ({"change": 1.5}, r"change must be in \[0, 1\], got 1.5"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Population(**settings)


@pytest.mark.parametrize(("size", "quantile"), [(2, 0.25), (4, 0.1)])
def test_in_the_smallest_population_one_gives_way(size: int, quantile: float) -> None:
    searcher = population(size=size, quantile=quantile, change=1.0)
    points = {f"t{number}": searcher.suggest(f"t{number}") for number in range(size)}
    for number, id in enumerate(points):
        searcher.on_trial_complete(id, {"top1": float(number), "size_bytes": 1.0})
    later = [searcher.suggest(f"u{number}") for number in range(size)]
    knobs = [
        [
            {name: value for name, value in point.items() if name != GENERATION}
            for point in some
            if isinstance(point, dict)
        ]
        for some in (points.values(), later)
    ]
    changed = [before != after for before, after in zip(*knobs, strict=True)]
    assert changed == [True, *([False] * (size - 1))], "the first is the least accurate"
