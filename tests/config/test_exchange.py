"""One override exchanges a quantizer of an experiment: any for any, with its own options and granularity as before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from qtrain.config.compose import compose, compose_config
from qtrain.config.exchange import compose_exchanging
from qtrain.config.experiment_file import as_experiment
from qtrain.config.instantiate import component
from qtrain.quantizers.base import MakeQuantizer
from qtrain.quantizers.wrappers.wrapper import innermost
from qtrain.run_task import run_task
from qtrain.settings.conf_dir import conf_dir
from qtrain.spec import Granularity, PerChannel, PerGroup, PerTensor, QuantSpec
from qtrain.utils.errors import ConfigError

W4A4 = "+experiment=cifar10/resnet20_w4a4"
"""Per channel, and ``init=range`` for both quantizers."""
QUANTIZERS = sorted(path.stem for path in (conf_dir() / "quantizer").glob("*.yaml"))
FOLDER = conf_dir() / "experiment"
EXPERIMENTS = sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.yaml"))
GRANULARITIES: dict[str | None, Granularity] = {"channel": PerChannel(0), "tensor": PerTensor()}


def node(cfg: DictConfig, place: str) -> dict[str, Any]:
    plain = OmegaConf.to_container(OmegaConf.select(cfg, place), resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def weight_of(*overrides: str) -> dict[str, Any]:
    """The checked weight quantizer of a config."""
    return dict(compose(overrides).quantize.weight.plain)


@pytest.fixture
def hydras() -> Iterator[None]:
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        yield


@cache
def composed(name: str | None, overrides: tuple[str, ...]) -> DictConfig:
    """Only what an exchange looks at: composing takes long, and copying a whole config too."""
    cfg = hydra.compose(name, overrides=list(overrides), return_hydra_config=True)
    choices = OmegaConf.to_container(cfg.hydra.runtime.choices)
    return OmegaConf.create({"quantize": cfg.quantize, "hydra": {"runtime": {"choices": choices}}})


def compose_once(name: str | None, overrides: Sequence[str]) -> DictConfig:
    return composed(name, tuple(overrides)).copy()


@pytest.mark.parametrize("apart", [12, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("number", "experiment"), [*enumerate(EXPERIMENTS)])
def test_every_quantizer_takes_the_place_of_an_experiments(
    number: int, experiment: str, apart: int, hydras: None
) -> None:
    """All of them in all experiments, or each in some and each experiment with some, for time."""
    for place in ("quantize.weight", "quantize.input"):
        first = (number + (place == "quantize.input") * apart // 2) % apart
        for quantizer in QUANTIZERS[first::apart]:
            assert_exchanged(experiment, place, quantizer)


def assert_exchanged(experiment: str, place: str, quantizer: str) -> None:
    """``quantizer`` has its own options, and can be made; granularity is as it was."""
    cfg, exchanges = compose_exchanging(compose_once, [f"+experiment={experiment}", f"quantizer@{place}={quantizer}"])
    make = component(node(cfg, place), key=place).build()
    alone = node(compose_once(None, [f"+quantizer@{place}={quantizer}"]), place)
    if not exchanges:  # it is what the experiment has anyway
        assert node(cfg, place)["_target_"] == alone["_target_"]
        return
    (exchange,) = exchanges
    assert (exchange.place, exchange.after) == (place, quantizer)
    own = {key: value for key, value in node(cfg, place).items() if key not in ("granularity", "quantizer")}
    assert own == {key: value for key, value in alone.items() if key in own}
    assert_granularity(make, GRANULARITIES.get(exchange.granularity), is_weight=place == "quantize.weight")


def assert_granularity(make: MakeQuantizer, granularity: Granularity | None, *, is_weight: bool) -> None:
    """The quantizer can be made, and has ``granularity`` where one was taken over; or it says for what it is made."""
    shape = (8, 4, 3, 3) if is_weight else ()
    kind = make.func if hasattr(make, "func") else make
    bits = 4 if 4 in kind.widths else kind.widths[0]
    try:
        made = make(spec=QuantSpec(bits=bits, shape=shape))
    except ValueError as error:
        assert "only, not" in str(error), error
    else:
        if granularity is not None:
            assert innermost(made).granularity == granularity


def test_options_of_an_experiment_go_with_its_quantizer() -> None:
    assert "init" in weight_of(W4A4)
    assert "init" not in weight_of(W4A4, "quantizer@quantize.weight=lsq_plus")
    settings = compose([W4A4, "quantizer@quantize.input=pact"])
    assert settings.quantize.input.get("init") is None, "PACT's init is another option than LSQ's"
    assert settings.quantize.weight.get("init") == "range", "the other quantizer keeps its options"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["quantizer@quantize.weight=lsq_plus"], PerChannel(0)),
        (["quantizer@quantize.weight=outlier"], PerChannel(0)),
        (["quantizer@quantize.weight=outlier", "quantizer@quantize.weight.quantizer=twn"], PerChannel(0)),
        (
            ["quantizer@quantize.weight=affine", "granularity@quantize.weight.granularity=group",
             "quantize.weight.granularity.size=2"],
            PerGroup(2),
        ),
        (["quantizer@quantize.weight=affine", "quantize.weight.granularity.axis=-1"], PerChannel(-1)),
    ],
)  # fmt: skip
def test_granularity_stays_with_the_layer_unless_the_command_says_another(
    overrides: list[str], expected: Granularity
) -> None:
    make = compose([W4A4, *overrides]).quantize.weight.build()
    assert innermost(make(spec=QuantSpec(bits=2, shape=(8, 4, 3, 3)))).granularity == expected


def test_options_from_the_command_line_apply_to_the_new_quantizer() -> None:
    chosen = [W4A4, "quantizer@quantize.weight=oscillation", "quantizer@quantize.weight.quantizer=affine"]
    options = [
        "quantize.weight.quantizer.narrow=true", "+schedule@quantize.weight.threshold=cosine",
        "quantize.weight.threshold.start=0.1",
    ]  # fmt: skip
    weight = weight_of(*chosen, *options)
    assert weight["quantizer"]["narrow"] is True
    assert weight["threshold"]["start"] == 0.1


def test_inner_quantizer_alone_is_exchanged() -> None:
    chosen = ["+experiment=cifar10/oscillation", "quantizer@quantize.weight.quantizer=affine"]
    weight = weight_of(*chosen)
    assert weight["_target_"].endswith("Oscillation")
    assert set(weight["quantizer"]) == {"_target_", "_partial_", "granularity", "symmetric", "narrow"}
    assert weight["quantizer"]["granularity"]["_target_"].endswith("PerTensor")


def test_quantizer_of_a_policy_is_exchanged() -> None:
    place = "quantize.policies.first_last.weight"
    cfg = compose_config(["+experiment=cifar10/apot", f"quantizer@{place}=affine"])
    assert "init" not in node(cfg, place)
    assert compose_config(["+policy@quantize.policies.ends=first_last"]).quantize.policies.ends.weight.init == "range"


def test_the_same_quantizer_keeps_the_experiments_options() -> None:
    assert weight_of(W4A4, "quantizer@quantize.weight=lsq") == weight_of(W4A4)


def test_a_note_says_what_was_exchanged() -> None:
    notes: list[str] = []
    compose_config([W4A4, "quantizer@quantize.weight=lsq_plus", "quantizer@quantize.input=lsq"], notes=notes)
    assert notes == [
        "quantize.weight: lsq_plus in place of lsq, with its own options, and granularity channel as before"
    ]


def test_quantizer_inside_one_that_is_exchanged_goes_with_it() -> None:
    """The experiment's own inner quantizer is gone with the wrapper around it, so only one is exchanged."""
    notes: list[str] = []
    chosen = ["quantizer@quantize.weight=incremental", "quantizer@quantize.weight.quantizer=affine"]
    cfg = compose_config(["+experiment=cifar10/oscillation", *chosen], notes=notes)
    assert node(cfg, "quantize.weight.quantizer")["_target_"].endswith("Affine")
    (note,) = notes
    assert note.startswith("quantize.weight: incremental in place of oscillation, with its own options")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["quantizer@quantize.weight=lsqplus"], r"quantizer=lsqplus: .*did you mean 'lsq_plus'"),
        (["quantizer@quantize.wieght=lsq_plus"], r"Could not override 'quantizer@quantize.wieght'"),
        (["quantizer@quantize.weight=lsq_plus", "quantize.weight.init=range"], "unknown key 'quantize.weight.init'"),
        (["quantizer@quantize.weight=affine", "quantize.weight.narow=true"], "did you mean 'quantize.weight.narrow'"),
        (["quantizer@quantize.weight=affine", "+quantize.weight.narow=true"], "Affine has no such argument"),
        (["quantizer@quantize.weight=lsq_plus", "~quantize.weight.inti"], "'quantize.weight.inti' does not exist"),
        (
            ["quantizer@quantize.weight=dorefa", "granularity@quantize.weight.granularity=channel"],
            "Could not override 'granularity@quantize.weight.granularity'",
        ),
    ],
)
def test_mistakes_about_an_exchanged_quantizer_are_refused_in_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        compose([W4A4, *overrides])
    assert "\n" not in str(caught.value)


def test_an_option_taken_away_by_hand_is_no_mistake() -> None:
    """Commands that were written when the option stayed behind."""
    assert weight_of(W4A4, "quantizer@quantize.weight=lsq_plus", "~quantize.weight.init") == weight_of(
        W4A4, "quantizer@quantize.weight=lsq_plus"
    )


def test_variants_about_the_former_quantizer_name_themselves(tmp_path: Any) -> None:
    overrides = ["+experiment=cifar10/oscillation", "quantizer@quantize.weight=lsq_plus", f"output={tmp_path}"]
    with pytest.raises(ConfigError, match=r"variants.plain: unknown key 'quantize.weight.dampening'.*variants=null"):
        run_task(compose(overrides), overrides)


def test_a_file_of_overrides_leaves_exchanges_to_the_command_line() -> None:
    overrides = [W4A4, "quantizer@quantize.weight=lsq_plus", "granularity@quantize.weight.granularity=tensor", "seed=1"]
    content, left = as_experiment(overrides)
    assert left == overrides[1:3]
    assert content == {"defaults": [{"/experiment": "cifar10/resnet20_w4a4"}, "_self_"], "seed": 1}
