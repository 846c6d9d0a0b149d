"""What of a config is the run, and what is only where it runs."""

from __future__ import annotations

from qtrain.config.compose import compose
from qtrain.settings.run_identity import recorded, restored


def test_a_run_is_the_same_on_more_processes() -> None:
    one, two = compose(["seed=1"]), compose(["seed=1", "trainer.devices=2", "trainer.strategy=ddp"])
    assert one.identity == two.identity != compose(["seed=2"]).identity
    assert recorded(two.plain)["trainer"]["devices"] == 2, "its config tells how it ran"


def test_a_run_is_the_same_whatever_is_predicted() -> None:
    other = compose(["seed=1", "images=[photos]", "predict.top_k=1"])
    assert other.identity == compose(["seed=1"]).identity
    assert {"images", "predict"} & recorded(other.plain).keys() == set()
    assert restored(recorded(other.plain), other.plain) == other.plain


def test_a_stage_of_a_run_is_the_same_on_more_processes() -> None:
    stages = ["+stages.a=['fit.epochs=2','trainer.devices=1']", "+stages.b=['fit.epochs=1']"]
    assert compose(stages).identity == compose([*stages, "trainer.devices=2"]).identity
