"""The parts of each experiment belong together: policies are whole, and a sweep's starts name its knobs."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from qtrain.config.compose import compose
from qtrain.settings.conf_dir import conf_dir

FOLDER = conf_dir() / "experiment"
EXPERIMENTS = sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.yaml"))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_policies_are_whole_and_starts_name_knobs(experiment: str) -> None:
    cfg = compose([f"+experiment={experiment}"])
    for name, policy in (cfg.quantize.policies or {}).items():
        assert "_target_" in policy, f"quantize.policies.{name} sets fields of a policy that is not there"
    knobs = {name: OmegaConf.to_container(cfg.sweep.space)[name] for name in cfg.sweep.space or ()}
    for name, knob in knobs.items():
        bundle = isinstance(knob, dict) and all(isinstance(option, list) for option in knob.values())
        assert knob is None or isinstance(knob, list) or bundle or "_target_" in knob, f"sweep.space.{name}"
    for start in cfg.sweep.start:
        unknown = {name for name in start if knobs.get(name) is None}
        assert not unknown, f"sweep.start: {unknown}"
