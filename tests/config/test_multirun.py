"""The jobs of a multirun have folders of their own, or are refused before the first of them."""

from itertools import product
from pathlib import Path

import pytest

from qtrain.config.compose import compose
from qtrain.config.multirun import check_multirun, named_job, swept_keys
from qtrain.utils.errors import ConfigError


def folders(*typed: str) -> list[str]:
    """The folders of the jobs of ``typed``, which has no commas but between values."""
    values = [[f"{key}={value}" for value in values.split(",")] for key, _, values in (t.partition("=") for t in typed)]
    return [named_job(job, swept_keys(typed))[1].run_dir for job in product(*values)]


def test_names_tell_each_key_that_a_multirun_varies() -> None:
    assert folders("objective=hard,soft", "optimizer.lr=0.1", "seed=1", "teacher=cifar_resnet20") == [
        "outputs/adhoc/w4a4-seed1-objective-hard",
        "outputs/adhoc/w4a4-distill-seed1-objective-soft",
    ]
    assert folders("optimizer.lr=0.1,0.01", "trainer.devices=1") == [
        "outputs/adhoc/w4a4-lr0.1",
        "outputs/adhoc/w4a4-lr0.01",
    ]


def test_own_name_variants_and_sweeps_get_what_differs_as_well() -> None:
    assert folders("name=mine", "seed=0,3") == ["outputs/adhoc/mine", "outputs/adhoc/mine-seed3"]
    assert folders("task=sweep", "seed=0,3") == ["outputs/adhoc/sweep", "outputs/adhoc/sweep-seed3"]
    overrides, settings = named_job(["+experiment=quickstart", "seed=3"], ["seed"])
    assert overrides[-1] == "name='seed3'" and settings.variants
    check_multirun(["+experiment=quickstart", "seed=0,3"])


def test_keys_that_end_alike_are_told_by_their_whole_name() -> None:
    keys = ["optimizer.lr", "full_precision.optimizer.lr"]
    _, settings = named_job([f"{key}=0.5" for key in keys], keys)
    assert Path(settings.run_dir).name == "w4a4-optimizer.lr0.5-full_precision.optimizer.lr0.5"


def test_values_that_make_no_folder_name_are_rewritten_and_cut() -> None:
    long = "'" + "x/" * 40 + "'"
    ((_, first), (_, second)) = (
        named_job(["data=imagefolder", f"data.root={own}"], ["data.root"]) for own in ("'a/b c'", long)
    )
    assert Path(first.run_dir).name == "w4a4-root-a_b_c"
    assert len(Path(second.run_dir).name) < 60


@pytest.mark.parametrize(
    ("typed", "place"),
    [
        (["seed=0,0"], "outputs/adhoc/w4a4"),
        (["quantize.enabled=false", "quantize.bits.weight=4,2"], "outputs/adhoc/fp"),
        (["task=predict", "seed=0,1", "predict.output=classes.csv"], "classes.csv"),
    ],
)
def test_jobs_that_would_share_a_folder_are_refused(typed: list[str], place: str) -> None:
    with pytest.raises(ConfigError, match=f"-m: jobs 0 and 1 would both write to {place}; "):
        check_multirun(typed)


def test_mistake_in_a_later_job_is_found_before_the_first() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.lr: SGD takes float"):
        check_multirun(["optimizer.lr=0.1,fast"])


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["objective=hard", "teacher=cifar_resnet20"], "w4a4"),
        (["objective=soft", "teacher=cifar_resnet20"], "w4a4-distill"),
        (["objective=hard", "teacher=cifar_resnet20", "+term@objective.terms.soft=soft"], "w4a4-distill"),
        (["objective=hard", "teacher=cifar_resnet20", "stages=qkd"], "w4a4-distill"),
        (["objective=soft", "teacher=none"], "w4a4"),
    ],
)
def test_run_is_named_distilled_if_a_term_looks_at_the_teacher(overrides: list[str], name: str) -> None:
    assert Path(compose(overrides).run_dir).name == name
