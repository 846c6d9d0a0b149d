"""Which trials nobody beats: the Pareto front, and the order of trials behind it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from qtrain.sweep.trial import Trial

Direction = Literal["max", "min"]
Objectives = Mapping[str, Direction]
"""Metric -> whether more or less of it is better. The first one drives a scheduler."""


def front(trials: Iterable[Trial], objectives: Objectives) -> list[Trial]:
    """The finished trials that no other one dominates, the best by the first objective first.

    A trial dominates another if it is at least as good by each objective and better by one. Trials of equal metrics do
    not dominate each other. One that lacks a metric is not compared.
    """
    found = [(losses(trial, objectives), trial) for trial in trials if has_metrics(trial, objectives)]
    best = [(own, trial) for own, trial in found if not any(dominates(other, own) for other, _ in found)]
    return [trial for _, trial in sorted(best, key=lambda pair: pair[0])]


def has_metrics(trial: Trial, objectives: Objectives) -> bool:
    """Whether ``trial`` was run to its end and has each of the metrics."""
    return trial.status == "finished" and all(name in trial.metrics for name in objectives)


def losses(trial: Trial, objectives: Objectives) -> tuple[float, ...]:
    """The metrics of ``trial``, signs such that less is better."""
    return losses_of(trial.metrics, objectives)


def losses_of(metrics: Mapping[str, float], objectives: Objectives) -> tuple[float, ...]:
    """``metrics`` in the order of ``objectives``, signs such that less is better."""
    return tuple(-metrics[name] if direction == "max" else metrics[name] for name, direction in objectives.items())


def dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether losses ``a`` are nowhere above ``b``, and somewhere below."""
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


def ranked(points: Sequence[Sequence[float]]) -> list[int]:
    """Places of ``points`` (losses), the best first: front by front, and within one the loneliest first.

    The first front is what nobody dominates, the second what nobody else does, and so on; how lonely a point is, its
    crowding distance says (Deb et al. 2002, §III-A and B, https://doi.org/10.1109/4235.996017).
    """
    left, order = list(range(len(points))), []
    while left:
        best = [i for i in left if not any(dominates(points[j], points[i]) for j in left)]
        distance = dict(zip(best, _crowding([points[i] for i in best]), strict=True))
        order += sorted(best, key=lambda i: (-distance[i], points[i], i))
        left = [i for i in left if i not in distance]
    return order


def _crowding(points: Sequence[Sequence[float]]) -> list[float]:
    """Half the girth of the box that each point's neighbors span, as parts of the whole; infinite at the ends."""
    distances = [0.0] * len(points)
    for axis in range(len(points[0])):
        order = sorted(range(len(points)), key=lambda i: points[i][axis])
        span = points[order[-1]][axis] - points[order[0]][axis]
        for before, here, after in zip(order, order[1:], order[2:], strict=False):
            distances[here] += (points[after][axis] - points[before][axis]) / span if span else 0.0
        for end in (order[0], order[-1]):
            distances[end] = float("inf")
    return distances
