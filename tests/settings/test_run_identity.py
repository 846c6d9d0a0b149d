"""What of a config is the run, and what is only where it runs."""

from __future__ import annotations

from qtrain.config.compose import compose
from qtrain.pipeline import run_folder
from qtrain.settings.run_identity import plain_config


def test_a_run_is_the_same_on_more_processes() -> None:
    one, two = compose(["seed=1"]), compose(["seed=1", "trainer.devices=2", "trainer.strategy=ddp"])
    assert run_folder.identity_of(one) == run_folder.identity_of(two) != run_folder.identity_of(compose(["seed=2"]))
    assert plain_config(two)["trainer"]["devices"] == 2, "its config tells how it ran"


def test_a_stage_of_a_run_is_the_same_on_more_processes() -> None:
    stages = ["+stages.a=['fit.epochs=2','trainer.devices=1']", "+stages.b=['fit.epochs=1']"]
    assert run_folder.identity_of(compose(stages)) == run_folder.identity_of(compose([*stages, "trainer.devices=2"]))
