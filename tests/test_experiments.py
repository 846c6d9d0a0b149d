"""The parts of each experiment belong together: policies are whole, and a sweep's starts name its knobs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from qtrain.settings.component import Component
from qtrain.settings.conf_dir import conf_dir
from tests.helpers.composed import composed_experiment

FOLDER = conf_dir() / "experiment"
EXPERIMENTS = sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.yaml"))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_policies_are_whole_and_starts_name_knobs(experiment: str) -> None:
    settings = composed_experiment(experiment)
    for name, policy in (settings.quantize.policies or {}).items():
        assert isinstance(policy, Component), f"quantize.policies.{name} sets fields of a policy that is not there"
    knobs = settings.sweep.space or {}
    for name, knob in knobs.items():
        bundle = isinstance(knob, Mapping) and all(isinstance(option, Sequence) for option in knob.values())
        listed = isinstance(knob, Sequence)
        assert knob is None or listed or bundle or isinstance(knob, Component), f"sweep.space.{name}"
    for start in settings.sweep.start:
        unknown = {name for name in start if knobs.get(name) is None}
        assert not unknown, f"sweep.start: {unknown}"
