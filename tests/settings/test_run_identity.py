"""What of a config is the run, and what is only where it runs."""

from __future__ import annotations

import pytest

from qtrain.config.compose import compose
from qtrain.settings.run_identity import comparable, recorded, restored, without_seeds


def test_a_run_is_the_same_on_more_processes() -> None:
    one, two = compose(["seed=1"]), compose(["seed=1", "trainer.devices=2", "trainer.strategy=ddp"])
    assert one.identity == two.identity != compose(["seed=2"]).identity
    assert recorded(two.plain)["trainer"]["devices"] == 2, "its config tells how it ran"


def test_a_run_is_the_same_whatever_is_predicted() -> None:
    other = compose(["seed=1", "images=[photos]", "predict.top_k=1"])
    assert other.identity == compose(["seed=1"]).identity
    assert {"images", "predict"} & recorded(other.plain).keys() == set()
    assert restored(recorded(other.plain), other.plain) == other.plain


def test_a_run_is_the_same_wherever_things_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, answers, images, scores: on another machine, or after a move of the cache, a run goes on."""
    found = []
    for place in ("/one", "/other"):
        monkeypatch.setenv("QTRAIN_CACHE", place)
        settings = compose(["seed=1"])
        assert str(settings.plain).count(f"{place}/") == 4
        found.append((settings.identity, settings.recipe))
    assert found[0] == found[1]


def test_a_stage_of_a_run_is_the_same_on_more_processes() -> None:
    stages = ["+stages.a=['fit.epochs=2','trainer.devices=1']", "+stages.b=['fit.epochs=1']"]
    assert compose(stages).identity == compose([*stages, "trainer.devices=2"]).identity


def test_a_run_is_the_same_whole_or_in_shards() -> None:
    assert compose(["fit.shard=true"]).identity == compose([]).identity
    stage = {"fit": {"epochs": 2, "shard": True}, "teacher": {"shard": True}}
    assert comparable({"fit": {"shard": False}, "stages": {"a": stage}}) == {
        "fit": {},
        "stages": {"a": {"fit": {"epochs": 2}, "teacher": {}}},
    }


def test_options_that_came_later_are_no_difference_where_they_change_nothing() -> None:
    """A run that began without them goes on."""
    later = compose(["seed=1"])
    before = comparable(recorded(later.plain))
    assert {"labeled", "test_images"} & before["data"].keys() == set() and "all_labels" not in before["full_precision"]
    assert later.identity != compose(["seed=1", "data.labeled=100"]).identity
    assert later.identity != compose(["seed=1", "data.test_images=100"]).identity


def test_recipe_is_common_to_runs_that_differ_in_seeds_alone() -> None:
    """The data have a seed of their own, which follows the run's."""
    one, two = compose(["seed=1"]), compose(["seed=2"])
    assert one.plain["data"]["seed"] != two.plain["data"]["seed"]
    assert one.recipe == two.recipe != compose(["seed=1", "optimizer.lr=0.5"]).recipe
    assert without_seeds({"seed": 1, "data": {"seed": 2, "size": 3, "order": {"seed": 4}}}) == {
        "data": {"size": 3, "order": {}}
    }
