"""Code of the user's own runs where the user names it, and never because a config does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from qtrain.config.compose import compose, from_plain
from qtrain.config.experiment_file import as_experiment
from qtrain.config.targets import resolve_target
from qtrain.run_task import run_task
from qtrain.sweep.knobs import Choice
from qtrain.sweep.make_space import rehearse_space
from qtrain.sweep.space import Space
from qtrain.utils.errors import ConfigError
from tests.helpers.own_package import own_package

OWN = ["model=own", "model.builder=ownconf.build"]


@pytest.fixture(scope="module", autouse=True)
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with own_package(tmp_path_factory.mktemp("own"), "ownconf"):
        yield


def experiment(folder: Path, text: str) -> list[str]:
    (folder / "experiment").mkdir()
    (folder / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{text}\n")
    return [f"hydra.searchpath=[file://{folder}]", "+experiment=mine"]


def test_what_the_command_line_names_is_admitted_wherever_it_is_defined() -> None:
    settings = compose([*OWN, "+model.options.width=3"])
    assert settings.allow_targets == ("ownconf.build",), "defined in ownconf.networks"
    assert settings.model.options["options"] == {"width": 3}
    with pytest.raises(ConfigError, match=r"_target_: 'ownconf\.networks\.Plain' is not admitted"):
        resolve_target("ownconf.networks.Plain", allow=settings.allow_targets)


def test_a_name_follows_from_the_builder() -> None:
    assert compose(OWN).model.name == "ownconf.build"
    assert compose(["model=own", "model.builder=ownconf.networks.Wide"]).model.name == "Wide"
    assert compose([*OWN, "model.name=mine"]).model.name == "mine"
    assert compose(["data=own", "data.builder=ownconf.images.split"]).data.name == "images.split"


@pytest.mark.parametrize("place", ["model", "data"])
def test_a_yaml_file_needs_the_command_line_to_admit_its_builder(tmp_path: Path, place: str) -> None:
    text = f"defaults: [{{override /{place}: own}}]\n{place}: {{builder: ownconf.networks.Plain}}"
    overrides = experiment(tmp_path, text)
    with pytest.raises(ConfigError, match=rf"{place}\.builder: 'ownconf\.networks\.Plain' is not admitted"):
        compose(overrides)
    for admitted in ("ownconf", "ownconf.networks.Plain"):
        assert compose([*overrides, f"allow_targets=[{admitted}]"]).plain[place]["builder"] == "ownconf.networks.Plain"


@pytest.mark.parametrize(
    "text",
    [
        "callbacks: {x: {_target_: qtrain.models.own.build_own, builder: os.system, options: {command: ls}}}",
        "callbacks: {x: {_target_: qtrain.models.own.build_own, builder: {_target_: torch.nn.Identity}}}",
        "callbacks: {x: {_target_: qtrain.utils.user_code.import_builder, path: os.system}}",
        "callbacks: {x: {_target_: qtrain.utils.importing.import_object, path: os.system, admitted: [os]}}",
        "callbacks: {x: {_target_: qtrain.packed.load.load_student, path: x, builders: [os]}}",
        "callbacks: {x: {_target_: qtrain.data.own.OwnImages, name: x, builder: torch.hub.load}}",
    ],
)
def test_no_other_place_of_a_config_names_code(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"^callbacks\.x\.\w+: ('.*' is not admitted|must be a dotted name)"):
        compose([*experiment(tmp_path, text), *OWN])


def test_variants_and_stages_of_a_config_admit_nothing(tmp_path: Path) -> None:
    text = "variants: {a: [model.builder=ownconf.networks.Plain]}"
    overrides = [*experiment(tmp_path, text), *OWN, f"output={tmp_path}"]
    with pytest.raises(ConfigError, match=r"model\.builder: 'ownconf\.networks\.Plain' is not admitted"):
        run_task(compose(overrides), overrides)
    stages = "stages: {a: [teacher=own, teacher.model.builder=ownconf.networks.Plain]}"
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{stages}\n")
    with pytest.raises(ConfigError, match=r"stages\.a: teacher\.model\.builder: 'ownconf\.networks\.Plain' is not"):
        compose(overrides)
    stage = compose([*overrides, "allow_targets=[ownconf]"]).stages["a"]
    assert stage.teacher.model is not None and stage.teacher.model.name == "Plain"


def test_a_stage_has_what_the_command_line_names() -> None:
    settings = compose([*OWN, "+stages={a: ['fit.epochs=2']}"])
    assert settings.stages["a"].allow_targets == ("ownconf.build",)


@pytest.mark.parametrize("knob", ["allow_targets", "hydra.searchpath"])
def test_a_knob_of_a_sweep_admits_nothing(knob: str) -> None:
    space = Space({knob: Choice(options=["[os]"])})
    with pytest.raises(ConfigError, match=rf"sweep\.space: .{knob}=.* sets {knob.split('.')[0]}, which all trials"):
        rehearse_space(compose(OWN), space, lambda changes: compose([*OWN, *changes], typed=OWN))


def test_a_trial_has_what_the_command_line_names_and_no_more() -> None:
    assert compose([*OWN, "seed=1"], typed=OWN).model.name == "ownconf.build"
    with pytest.raises(ConfigError, match=r"'ownconf\.networks\.Plain' is not admitted"):
        compose([*OWN, "model.builder=ownconf.networks.Plain"], typed=OWN)
    with pytest.raises(ConfigError, match="allow_targets: may be given on the command line only"):
        compose([*OWN, "allow_targets=[os]"], typed=OWN)


def test_a_recorded_config_runs_what_the_reader_admits() -> None:
    plain = compose(OWN).plain
    assert from_plain(plain).model.name == "ownconf.build", "a sweep's own trial"
    with pytest.raises(ConfigError, match=r"model\.builder: 'ownconf\.build' is not admitted"):
        from_plain(plain, allow=())


def test_an_experiment_file_leaves_the_builder_to_the_command_line() -> None:
    content, left = as_experiment([*OWN, "+model.options.width=3"])
    assert content == {"defaults": [{"override /model": "own"}, "_self_"], "model": {"options": {"width": 3}}}
    assert left == ["model.builder=ownconf.build"]


WRONG = {
    "none given": (["model=own"], r"^missing: give model\.builder=\.\.\.$"),
    "no dotted path": (["model=own", "model.builder=ownconf"], r"must be a dotted name such as mypackage\.build, got"),
    "a number": (["model=own", "model.builder=5"], r"model\.builder: must be a dotted name"),
    "a typo": (["model=own", "model.builder=ownconf.bild"], r"ownconf has no 'bild'; did you mean 'build'\?"),
    "no such module": (
        ["model=own", "model.builder=ownconv.build"],
        r"model\.builder: cannot import ownconv: there is no module 'ownconv' in /",
    ),
    "no callable": (["model=own", "model.builder=ownconf.networks.NUMBER"], r"must be a class or function, got a val"),
    "an unknown option": (
        ["model=own", "model.builder=ownconf.networks.Wide", "+model.options.widht=3"],
        r"^model\.options\.widht: Wide has no such argument; did you mean 'width'\? \(it takes num_classes, in_chan",
    ),
    "an option of a wrong type": (
        [*OWN, "+model.options.width=x"],
        r"^model\.options\.width: build takes int, got 'x'",
    ),
    "an option without its plus": (
        [*OWN, "model.options.width=3"],
        r"^unknown key 'model\.options\.width'; an option that is new there is added by a plus: \+model\.opt",
    ),
    "an option of no builder": ([*OWN, "model.widht=3"], r"^unknown key 'model\.widht'; did you mean 'model\.weights'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_builder_ends_in_one_line(name: str) -> None:
    overrides, line = WRONG[name]
    with pytest.raises(ConfigError, match=line) as error:
        compose(overrides)
    assert "\n" not in str(error.value)
