"""From a sweep's overrides and a trial's changes to the trial's config: the same as one types for it alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from qtrain.config.compose import compose, from_plain
from qtrain.sweep.trial_configs import TrialConfigs, always, joined, read_trial_config
from qtrain.utils.errors import ConfigError

SWEEP = """
    task=sweep +experiment=quickstart objective=hard teacher=none variants=null name=mine results=here.csv
    +sweep.space.objective=[soft,hard] search@sweep.search=grid sweep.trials=3
""".split()


def test_a_trial_is_what_its_overrides_compose(tmp_path: Path) -> None:
    configs = TrialConfigs(compose(SWEEP), SWEEP, folder=tmp_path, compose=compose)
    key, overrides = configs(["teacher=cifar_resnet20", "objective=soft"])
    own = ["+experiment=quickstart", "variants=null", "teacher=cifar_resnet20", "objective=soft"]
    assert overrides == [*own, "task=train", "fit.final_test=false", "data.val_fraction=0.1"]
    assert compose(overrides).identity == key
    kept = from_plain(read_trial_config(tmp_path / key, name="0001", knobs={"objective": "soft"}))
    assert kept.identity == key
    assert (kept.run_dir, kept.results, kept.task) == (str(tmp_path / key), None, "train")


def test_what_says_how_a_sweep_is_run_does_not_change_its_trials(tmp_path: Path) -> None:
    other = [*SWEEP, "sweep.trials=9", "sweep.parallel=1", f"output={tmp_path}", "+sweep.space.seed=[1]"]
    typed = [TrialConfigs(compose(own), own, folder=tmp_path, compose=compose) for own in (SWEEP, other)]
    keys = {configs(["optimizer.lr=0.01"])[0] for configs in typed}
    assert len(keys) == 1


def test_the_last_choice_of_a_group_counts_and_values_keep_their_order() -> None:
    given = ["objective=hard", "fit.epochs=1", "quantizer@quantize.weight=lsq", "objective=soft", "fit.epochs=2",
             "quantizer@quantize.input=lsq"]  # fmt: skip
    assert joined(given) == [*given[1:]]


def test_images_are_held_out_unless_the_sweep_does_so_itself() -> None:
    assert "data.val_fraction=0.2" in always(compose(["sweep.val_fraction=0.2"]))
    assert not [o for o in always(compose(["data.val_fraction=0.3"])) if o.startswith("data.")]
    assert "trainer.devices=2" in always(compose(["sweep.workers=2"]))
    assert "variants=null" in always(compose(["+experiment=quickstart"]))


def test_a_change_that_makes_no_config_is_refused(tmp_path: Path) -> None:
    configs = TrialConfigs(compose(SWEEP), SWEEP, folder=tmp_path, compose=compose)
    with pytest.raises(ConfigError, match=r"unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'"):
        configs(["optimizer.lrr=1"])
    assert not list(tmp_path.iterdir())
