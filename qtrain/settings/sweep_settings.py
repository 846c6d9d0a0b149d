"""The section ``sweep`` of the settings: what is searched, by what, and how many trials run at a time."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qtrain.settings.component import Component


@dataclass(frozen=True, kw_only=True)
class ResourceSettings:
    cpu: float
    gpu: float


@dataclass(frozen=True, kw_only=True)
class RewardSettings:
    cost: str
    target: float | None
    below: float
    above: float


@dataclass(frozen=True, kw_only=True)
class PriorSettings:
    scores: str | None
    trials: int
    spread: float


@dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """``space`` holds lists, mappings and components as the config has them; ``None`` takes a knob away."""

    space: Mapping[str, Any]
    start: tuple[Mapping[str, Any], ...]
    prior: PriorSettings
    objectives: Mapping[str, str | None]
    reward: RewardSettings
    search: Component
    scheduler: Component | None = None
    trials: int
    time_budget_s: float | None
    parallel: int | None
    resources: ResourceSettings
    workers: int
    max_failures: int
    cache_gb: float
    address: str | None
    storage: str | None
    val_fraction: float
    test_front: bool
