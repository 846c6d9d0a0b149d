"""How much of a metric's variance over the trials each knob explains."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import median_low
from typing import TYPE_CHECKING

from qtrain.sweep.domains import KnobValue, is_number
from qtrain.sweep.trial import Trial

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

FEWEST = 5
"""Below so many trials nothing is said."""

LISTED = 10
"""A knob of no more values than this is regarded as a list of them, each as likely as the others."""

TREES, DEPTH = 32, 8
"""Of the forest. More and deeper trees say the same of a hundred trials, and take three times as long."""

UNSEEN_TREES = 100
"""Trees of the forest that is asked of trials it has not seen: each trial is unseen by a third of them."""

Column = list[float] | list[int] | list[str]

DECADES = 30.0
"""A knob whose largest value is so many times its smallest is regarded by its digits, as rates are."""


def knob_importance(trials: Iterable[Trial], metric: str, *, seed: int = 0) -> dict[str, float]:
    """Knob -> its share of the variance of ``metric`` over the finished trials, the greatest first.

    Shares add up to what the knobs explain, below 1 (:func:`_explained`); there are none for fewer than :data:`FEWEST`
    trials, where all reached the same, or where the knobs explain nothing. By functional ANOVA over a random forest
    (Hutter, Hoos, Leyton-Brown, ICML 2014) knobs part that among them by the variances of their marginals, with all
    others averaged over their ranges. Where a condition leaves a knob out, one of words has that as a value of its own,
    and one of numbers its median, so that only trials in which it counts tell its values apart.
    """
    told = [trial for trial in trials if trial.status == "finished" and metric in trial.metrics]
    reached = [trial.metrics[metric] for trial in told]
    if len(told) < FEWEST or max(reached) == min(reached):
        return {}
    names = list(dict.fromkeys(name for trial in told for name in trial.knobs))
    columns = {name: _column([trial.knobs.get(name, _Absent) for trial in told]) for name in names}
    turned = {name: column for name, column in columns.items() if len(set(column)) > 1}
    explained = _explained(turned, reached, seed) if turned else 0.0
    if explained <= 0:
        return {}
    parts = _shares(turned, reached, seed) if len(turned) > 1 else dict.fromkeys(turned, 1.0)
    shares = {name: explained * parts.get(name, 0.0) for name in names}
    return dict(sorted(shares.items(), key=lambda pair: -pair[1]))


class _Absent:
    """Stands for the value of a knob that does not count."""


def _column(values: Sequence[KnobValue | type[_Absent]]) -> Column:
    """The values of one knob: words, places in a short list of numbers, or numbers."""
    there = [value for value in values if is_number(value)]
    if len(there) < sum(value is not _Absent for value in values):
        return ["" if value is _Absent else json.dumps(value) for value in values]
    middle = median_low(there)
    numbers = [float(value if is_number(value) else middle) for value in values]
    known = sorted(set(numbers))
    if len(known) <= LISTED:
        return [known.index(number) for number in numbers]
    wide = known[0] > 0 and known[-1] / known[0] >= DECADES
    return [math.log(number) for number in numbers] if wide else numbers


def _explained(columns: Mapping[str, Column], reached: list[float], seed: int) -> float:
    """R2 of what a random forest says of each trial from those of its trees that have not seen it (Breiman 2001).

    At most 1, and 0 or below where the knobs tell nothing: a forest follows the trials that it has seen, also where
    ``reached`` is chance. Of few trials it is low, so it claims too little rather than too much.
    """
    from sklearn.ensemble import RandomForestRegressor

    features: list[list[float]] = []
    for column in columns.values():
        if isinstance(column[0], str):
            features += [[float(value == word) for value in column] for word in sorted(set(map(str, column)))]
        else:
            features.append([float(value) for value in column])
    forest = RandomForestRegressor(UNSEEN_TREES, max_depth=DEPTH, oob_score=True, random_state=seed)
    return float(forest.fit(list(zip(*features, strict=True)), reached).oob_score_)


def _shares(columns: Mapping[str, Column], reached: list[float], seed: int) -> dict[str, float]:
    # Optuna takes a second to import, and the report of a single run comes through here as well.
    import optuna
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study()
        distributions = {name: _distribution(column) for name, column in columns.items()}
        for row, value in enumerate(reached):
            params = {name: column[row] for name, column in columns.items()}
            study.add_trial(optuna.create_trial(params=params, distributions=distributions, value=value))
        evaluator = FanovaImportanceEvaluator(n_trees=TREES, max_depth=DEPTH, seed=seed)
        found = get_param_importances(study, evaluator=evaluator)
    finally:
        optuna.logging.set_verbosity(verbosity)
    return {name: float(share) for name, share in found.items()}


def _distribution(column: Column) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(column[0], str):
        return CategoricalDistribution(sorted({str(value) for value in column}))
    low, high = min(map(float, column)), max(map(float, column))
    return IntDistribution(int(low), int(high)) if isinstance(column[0], int) else FloatDistribution(low, high)
