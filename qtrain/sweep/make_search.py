"""From the ``sweep`` section of a config to what searches its space, and what stops trials early.

Ray's own classes are made here and nowhere else: its OptunaSearch over a space with conditions, and its schedulers.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast, final

import optuna
from optuna.exceptions import ExperimentalWarning
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from qtrain.settings.run_settings import RunSettings
from qtrain.sweep.domains import Domain, Interval, KnobValue, Options
from qtrain.sweep.halving import ParetoHalving
from qtrain.sweep.local import LocalSearcher
from qtrain.sweep.pareto import Direction, Objectives, losses_of
from qtrain.sweep.population import PopulationSearcher
from qtrain.sweep.reward import REWARD
from qtrain.sweep.scheduler import Asha, Median, MoAsha, Scheduler
from qtrain.sweep.search import GridSearch, LocalSearch, Nsga2, Population, RandomSearch, Search, Tpe
from qtrain.sweep.searcher import EPOCHS, GridSearcher, PointSearcher, SpaceSearcher, complete
from qtrain.sweep.space import Given, Point, Space
from qtrain.sweep.trial import COST_METRICS
from qtrain.utils.errors import ConfigError, as_config_error

if TYPE_CHECKING:
    from ray.tune.execution.tune_controller import TuneController
    from ray.tune.experiment import Trial as RayTrial


def check_sweep(settings: RunSettings) -> None:
    """Raise :class:`ConfigError` for a value in ``settings.sweep`` that cannot be."""
    sweep = settings.sweep
    rules = {
        "trials": (sweep.trials >= 1, "at least 1"),
        "time_budget_s": (sweep.time_budget_s is None or sweep.time_budget_s > 0, "above 0, or null"),
        "parallel": (sweep.parallel is None or sweep.parallel >= 1, "at least 1, or null"),
        "workers": (sweep.workers >= 1, "at least 1"),
        "max_failures": (sweep.max_failures >= 0, "at least 0"),
        "cache_gb": (sweep.cache_gb >= 0, "at least 0"),
        "val_fraction": (0 < sweep.val_fraction < 1, "in (0, 1)"),
        "resources": (
            min(sweep.resources.cpu, sweep.resources.gpu) >= 0 and max(sweep.resources.cpu, sweep.resources.gpu) > 0,
            "numbers of at least 0, one of them above it",
        ),
    }
    for key, (kept, rule) in rules.items():
        if not kept:
            raise ConfigError(f"sweep.{key}: must be {rule}, got {getattr(sweep, key)}")
    objectives_of(settings)
    if settings.stages and isinstance(sweep.search.build(), Population):
        raise ConfigError(
            "sweep.search: a population makes stages of its own, beside which there are none; add stages=none"
        )
    make_scheduler(settings)


def objectives_of(settings: RunSettings) -> dict[str, Direction]:
    """``settings.sweep.objectives`` without those that were taken away."""
    found = {str(name): way for name, way in settings.sweep.objectives.items() if way is not None}
    if not found:
        raise ConfigError("sweep.objectives: must name a metric at least, for instance {top1: max}")
    for name, way in found.items():
        if way not in ("max", "min"):
            raise ConfigError(f"sweep.objectives.{name}: must be max or min, got {way!r}")
    if REWARD in found and settings.sweep.reward.target is None:
        raise ConfigError(
            "sweep.objectives.reward: needs sweep.reward.target, the most that sweep.reward.cost should be"
        )
    reward, further = settings.sweep.reward, settings.allocate.costs
    known = dict.fromkeys([*COST_METRICS, *(name for name, cost in further.items() if cost is not None)])
    if reward.cost not in known:
        raise ConfigError(
            f"sweep.reward.cost: must be one of {', '.join(known)}, got {reward.cost!r}; "
            "+cost@allocate.costs.latency=latency adds another"
        )
    if reward.target is not None and not 0 < reward.target < math.inf:
        raise ConfigError(f"sweep.reward.target: must be above 0, got {reward.target}")
    return cast(dict[str, Direction], found)


def make_searcher(settings: RunSettings, space: Space, prior: Sequence[Given] = ()) -> SpaceSearcher:
    """What proposes trials of ``space``, by ``settings.sweep.search``; all of its randomness comes from
    ``settings.seed``. It begins with ``settings.sweep.start``, then with the points of ``prior``.
    """
    check_sweep(settings)
    search: Search = settings.sweep.search.build()
    objectives = objectives_of(settings)
    start = [*settings.sweep.start, *prior]
    with as_config_error("sweep.start"):
        for point in start:
            space.completed(point)
    with as_config_error("sweep.search"):
        if isinstance(search, GridSearch):
            return GridSearcher(
                space, points=search.points, trials=settings.sweep.trials, seed=settings.seed, start=start
            )
        if isinstance(search, LocalSearch):
            return LocalSearcher(space, search, objectives=objectives, seed=settings.seed, start=start)
        if isinstance(search, Population):
            return PopulationSearcher(
                space,
                search,
                objectives=objectives,
                seed=settings.seed,
                epochs=settings.fit.epochs,
                lr_schedule=dict(settings.lr_schedule.plain),
                start=start,
            )
        return OptunaSearcher(space, _sampler(search, settings.seed), objectives=objectives, start=start)


def make_scheduler(settings: RunSettings) -> TrialScheduler | None:
    """Ray's scheduler for ``settings.sweep.scheduler``, in time :data:`EPOCHS`; ``None`` for none.

    It needs no trial of Ray's own: whatever has a ``trial_id`` will do.
    """
    chosen = settings.sweep.scheduler
    if chosen is None or chosen.target is None:  # none, whatever settings an experiment gave another one
        return None
    scheduler: Scheduler = chosen.build()
    if isinstance(settings.sweep.search.build(), Population):
        raise ConfigError(
            "sweep.scheduler: a population replaces its worst by itself; take scheduler@sweep.scheduler=none"
        )
    metric, mode = next(iter(objectives_of(settings).items()))
    if scheduler.grace > settings.fit.epochs:
        raise ConfigError(
            f"sweep.scheduler.grace: must be at most fit.epochs, "
            f"got {scheduler.grace} of {settings.fit.epochs}; give less"
        )
    if isinstance(scheduler, MoAsha):
        halving = ParetoHalving(grace=scheduler.grace, reduction=scheduler.reduction, last=settings.fit.epochs)
        return StopDominated(halving, objectives_of(settings))
    if isinstance(scheduler, Asha):
        return ASHAScheduler(
            time_attr=EPOCHS,
            metric=metric,
            mode=mode,
            max_t=settings.fit.epochs,
            grace_period=scheduler.grace,
            reduction_factor=scheduler.reduction,
            stop_last_trials=False,  # of which a knob may have made a longer training
        )
    assert isinstance(scheduler, Median)
    return MedianStoppingRule(
        time_attr=EPOCHS,
        metric=metric,
        mode=mode,
        grace_period=scheduler.grace,
        min_samples_required=scheduler.least,
        min_time_slice=cast(int, float("inf")),  # never pauses a trial to let others come as far
    )


@final
class StopDominated(FIFOScheduler):
    """Ray's view of ``rule``: a trial that it does not let go on is stopped."""

    def __init__(self, rule: ParetoHalving, objectives: Objectives) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._rule, self._objectives = rule, objectives

    def on_trial_result(self, tune_controller: TuneController, trial: RayTrial, result: dict[str, Any]) -> str:
        if any(name not in result for name in self._objectives):
            return TrialScheduler.CONTINUE
        on = self._rule.goes_on(trial.trial_id, result[EPOCHS], losses_of(result, self._objectives))
        return TrialScheduler.CONTINUE if on else TrialScheduler.STOP


def _sampler(search: RandomSearch | Tpe | Nsga2, seed: int) -> optuna.samplers.BaseSampler:
    with warnings.catch_warnings():
        # What Optuna calls experimental is what conditions between knobs and parallel trials need.
        warnings.simplefilter("ignore", ExperimentalWarning)
        if isinstance(search, Tpe):
            return optuna.samplers.TPESampler(
                n_startup_trials=search.startup,
                n_ei_candidates=search.candidates,
                multivariate=search.multivariate,
                group=search.multivariate,
                constant_liar=True,
                seed=seed,
            )
        if isinstance(search, Nsga2):
            return optuna.samplers.NSGAIISampler(
                population_size=search.population,
                crossover_prob=search.crossover,
                mutation_prob=search.mutation,
                seed=seed,
            )
        return optuna.samplers.RandomSampler(seed=seed)


@final
class OptunaSearcher(PointSearcher):
    """Ray's OptunaSearch over ``space``, which it walks knob by knob, so that conditions hold.

    Optuna sees places in lists rather than values: rising numbers in their order, so that it learns what lies between,
    anything else as categories.
    """

    def __init__(
        self, space: Space, sampler: optuna.samplers.BaseSampler, *, objectives: Objectives, start: Sequence[Given] = ()
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        super().__init__(space)
        self._objectives = objectives
        self._latest: Point = {}
        given = [space.completed(point) for point in start]
        self._search = OptunaSearch(
            space=self._define,
            metric=list(objectives),
            mode=list(objectives.values()),
            sampler=sampler,
            points_to_evaluate=[{n: _encoded(space.parameters[n], v) for n, v in point.items()} for point in given],
        )

    def suggest(self, trial_id: str) -> Point | str | None:
        with warnings.catch_warnings():
            # On a busy machine; there is nothing in it but the choice.
            warnings.filterwarnings("ignore", message="Define-by-run function")
            self._search.suggest(trial_id)
        self._points[trial_id] = self._latest
        return self._latest

    def on_trial_complete(self, trial_id: str, metrics: Mapping[str, float] | None = None, error: bool = False) -> None:
        if error or metrics is None or not complete(metrics, self._objectives):
            self._search.on_trial_complete(trial_id, None, error=True)
        else:
            self._search.on_trial_complete(trial_id, dict(metrics))

    def _define(self, trial: optuna.Trial) -> None:
        self._latest = self._space.choose(lambda name, domain: _suggested(trial, name, domain))


def _suggested(trial: optuna.Trial, name: str, domain: Domain) -> KnobValue:
    if isinstance(domain, Interval):
        if domain.whole:
            return trial.suggest_int(name, int(domain.low), int(domain.high), log=domain.log)
        return domain.rounded(trial.suggest_float(name, domain.low, domain.high, log=domain.log))
    places = len(domain.values)
    if domain.ordered:
        return domain.values[trial.suggest_int(name, 0, places - 1)]
    return domain.values[trial.suggest_categorical(name, list(range(places)))]


def _encoded(domain: Domain, value: KnobValue) -> KnobValue:
    return domain.index(value) if isinstance(domain, Options) else value
