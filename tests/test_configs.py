"""Every YAML file below conf/ composes, passes validation, and builds what its group promises."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import cache, partial
from pathlib import Path
from types import UnionType
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytest import param
from torch import nn

from qtrain.allocate.uniform import Uniform
from qtrain.config.compose import compose
from qtrain.convert.plan import Policy
from qtrain.convert.target import Target
from qtrain.costs.metrics.base import CostMetric
from qtrain.costs.technology import Technology
from qtrain.data.base import VisionData
from qtrain.distillation.base import Term
from qtrain.distillation.logit_format import LogitFormat
from qtrain.distillation.objective import Objective
from qtrain.observers.base import Observer
from qtrain.pipeline.stages import stages_of
from qtrain.ptq.rounding.base import Rounding
from qtrain.quantizers.base import Quantizer
from qtrain.schedules.base import Schedule
from qtrain.sensitivity.base import Score
from qtrain.settings.component import Component, built
from qtrain.settings.conf_dir import conf_dir
from qtrain.settings.run_settings import RunSettings
from qtrain.spec import Granularity, LayerBits, PerChannel, PerTensor, QuantSpec
from qtrain.sweep.knobs import Knob
from qtrain.sweep.scheduler import Scheduler
from qtrain.sweep.search import Search
from qtrain.synthesis.base import Synthesis
from qtrain.tracking.metric_log import MetricLog
from qtrain.utils.errors import ConfigError
from tests.helpers.composed import composed_experiment

CONF = conf_dir()

PACKAGES = {
    "quantizer": "quantize.weight",
    "observer": "quantize.weight_observer",
    "allocate": "quantize.bits",
    "schedule": "lr_schedule",
    "granularity": "quantize.weight.granularity",
    "gradient": "quantize.gradient",
    "policy": "quantize.policies.some",
    "callback": "callbacks.some",
    "equalize": "quantize.equalize",
    "rounding": "quantize.rounding",
    "bias": "quantize.bias",
    "teacher_cache": "teacher.cache.keeps",
    "term": "objective.terms.some",
    "search": "sweep.search",
    "knob": "sweep.space.some",
    "scheduler": "sweep.scheduler",
    "score": "allocate.score",
    "cost": "allocate.costs.some",
    "technology": "allocate.costs.some.technology",
}
"""Groups whose place in the config is not their own name."""

FILL = {
    "model/timm": ["model.name=test_efficientnet"],
    "model/own": ["model.builder=torchvision.models.mobilenet_v2", "+model.options.num_classes=7"],
    "teacher/own": ["teacher.model.builder=torchvision.models.mobilenet_v2"],
    "data/own": ["data.builder=torchvision.datasets.FakeData"],
    "data/imagefolder": ["data.root=images"],
    "data/parquet": ["data.root=images"],
    "knob/choice": ["sweep.space.some.options=[1,2]"],
    "knob/bundle": ["sweep.space.some.options={plain:[],long:['fit.epochs=9']}"],
    "knob/uniform": ["sweep.space.some.low=0", "sweep.space.some.high=1"],
    "knob/log_uniform": ["sweep.space.some.low=0.1", "sweep.space.some.high=1"],
    "knob/integers": ["sweep.space.some.low=1", "sweep.space.some.high=3"],
    "technology/45nm": ["+cost@allocate.costs.some=energy"],
    "technology/7nm": ["+cost@allocate.costs.some=energy"],
    "cost/latency": [f"allocate.costs.some.table={Path(__file__).parent / 'costs' / 'latency.json'}"],
    "allocate/from_file": [f"quantize.bits.path={Path(__file__).parent / 'allocate' / 'bits.yaml'}"],
    "policy/policy": ["quantize.policies.some.kinds=[linear]"],
}
"""Values that a file leaves to the user (``???``): what a user would give."""


def options(group: str) -> list[str]:
    folder = CONF / group
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


MANY = ("cifar10/shootout", "cifar10/distillation", "cifar10/data_free")
"""Experiments of dozens of variants, whose composing takes seconds each."""
slow = pytest.mark.slow

WHOLE = ("experiment", "hydra", "recipe")
"""Folders whose files are no options of a place, but change the whole config."""
GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name not in WHOLE)
ALONE = ("stages", "granularity", "cost", "technology", "score")
"""Groups whose options are not composed with others: stages compose again, some quantizers have no blocks, and metrics
and scores stand in a place of others."""
CASES = sorted((number, group, option) for group in GROUPS for number, option in enumerate(options(group)))
"""With an option's place in its group in front: those of one place are composed together, since composing is slow."""


def build_model(made: Any) -> None:
    with torch.device("meta"):  # shapes without memory: some are large
        assert isinstance(made(num_classes=7, in_channels=3, image_size=32), nn.Module)


def build_quantizer(made: Any) -> None:
    kind = made.func
    bits = 4 if 4 in kind.widths else kind.widths[0]
    shape = (8, 3, 3, 3) if "weight" in kind.serves else ()
    assert isinstance(made(spec=QuantSpec(bits=bits, shape=shape)), Quantizer)


def build_observer(made: Any) -> None:
    assert isinstance(made(granularity=PerTensor()), Observer)


def build_gradient(made: Any) -> None:
    assert made is None or isinstance(made(), nn.Module)


def build_allocate(made: Any) -> None:
    bits = made(["first", "middle", "last"])
    assert list(bits) == ["first", "middle", "last"]
    assert all(isinstance(layer, LayerBits) for layer in bits.values())


def build_schedule(made: Any) -> None:
    assert isinstance(made, Schedule)
    assert isinstance(made(0.5), float)


def build_optimizer(made: Any) -> None:
    assert isinstance(made([nn.Parameter(torch.zeros(2))]), torch.optim.Optimizer)


def build_trainer(made: Any) -> None:
    assert isinstance(made, partial), "the task adds callbacks and loggers, so it must be _partial_"


def build_teacher(made: Any) -> None:
    assert made.model is None or isinstance(made.model.build(), partial)


def build_logger(made: Any) -> None:
    assert all(isinstance(logger, partial) for logger in made.values()), "the task gives the run's folder"


def build_callback(made: Any) -> None:
    assert isinstance(made(metric_log=MetricLog(loggers=[])), pl.Callback)


def build_teacher_cache(made: Any) -> None:
    assert made is None or isinstance(made(num_classes=7), LogitFormat)


def may_be_a(kind: type | UnionType) -> Callable[[Any], None]:
    def build(made: Any) -> None:
        assert made is None or isinstance(made, kind), "none.yaml leaves it empty"

    return build


def is_a(kind: type | UnionType) -> Callable[[Any], None]:
    def build(made: Any) -> None:
        assert isinstance(made, kind)

    return build


BUILD: dict[str, Callable[[Any], None]] = {
    "model": build_model,
    "quantizer": build_quantizer,
    "observer": build_observer,
    "allocate": build_allocate,
    "schedule": build_schedule,
    "optimizer": build_optimizer,
    "trainer": build_trainer,
    "teacher": build_teacher,
    "logger": build_logger,
    "data": is_a(VisionData),
    "objective": is_a(Objective),
    "granularity": is_a(Granularity),
    "gradient": build_gradient,
    "policy": is_a(Policy),
    "callback": build_callback,
    "term": is_a(Term),
    "target": may_be_a(Target),
    "equalize": may_be_a(object),
    "rounding": may_be_a(Rounding),
    "bias": may_be_a(object),
    "synthesis": may_be_a(Synthesis),
    "teacher_cache": build_teacher_cache,
    "search": is_a(Search),
    "knob": is_a(Knob),
    "cost": is_a(CostMetric),
    "technology": is_a(Technology),
    "score": is_a(Score),
    "scheduler": may_be_a(Scheduler),
}
"""Group -> what its options must become. A new option needs no line here, a new group does."""


def node_at(settings: RunSettings, place: str) -> Any:
    """What stands at the dotted ``place``: a component, or a container of some."""
    node: Any = settings
    for part in place.split("."):
        if isinstance(node, Component):
            node = node.options
        node = node[part] if isinstance(node, Mapping) else getattr(node, part)
    return node


def choosing(group: str, option: str) -> list[str]:
    """Overrides that choose ``option``, with the values that it leaves to the user."""
    place = PACKAGES.get(group, group)
    sets_its_place = group == "teacher_cache"  # its files say themselves where they belong
    choice = f"{group}={option}" if place == group or sets_its_place else f"{group}@{place}={option}"
    if group in ("policy", "callback", "term", "knob", "cost"):  # the root config has none: one is added, not replaced
        choice = f"+{choice}"
    return [choice, *FILL.get(f"{group}/{option}", ())]


@cache
def composed_together(number: int) -> RunSettings | None:
    """Option ``number`` of each group in one config, or ``None`` where they do not go together."""
    chosen = [choosing(group, option) for place, group, option in CASES if place == number and group not in ALONE]
    try:
        return compose([override for own in chosen for override in own])
    except ConfigError:
        return None


@pytest.mark.parametrize(("number", "group", "option"), CASES, ids=str)
def test_option_composes_and_builds(number: int, group: str, option: str) -> None:
    place = PACKAGES.get(group, group)
    together = None if group in ALONE else composed_together(number)
    cfg = together or compose(choosing(group, option))
    if group == "stages":  # composed and validated by now, each a config of its own
        assert all(isinstance(stage.settings.objective.build(), Objective) for stage in stages_of(cfg, Path()))
        return
    made = built(node_at(cfg, place))
    BUILD[group](made)


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONF)))
def test_file_opens_with_a_comment(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith("# "), "say in the first line what the file is for"


OF_THE_PAPER = ("apot", "ewgs_adam", "lsq", "oscillation", "profit", "qkd", "sqakd", "inq", "apprentice")
"""How recipes are named whose papers have one scale for a weight."""


@pytest.mark.parametrize("budget", [param("full", marks=slow), "cpu", param("probe", marks=slow)])
@pytest.mark.parametrize("experiment", options("experiment"))
def test_experiment_composes(experiment: str, budget: str) -> None:
    cfg = composed_experiment(experiment, budget)
    assert cfg.experiment == experiment, "an experiment names itself after its file"
    if experiment.endswith(OF_THE_PAPER):
        made = cfg.quantize.weight.build()(spec=QuantSpec(bits=2, shape=(8, 4, 3, 3)))
        assert made.granularity == PerTensor(), "recipes of papers have one scale for a weight, as the papers"


@pytest.mark.parametrize("experiment", [param(name, marks=[slow] * (name in MANY)) for name in options("experiment")])
def test_variants_compose(experiment: str) -> None:
    """With one budget, since others have other numbers in the same places; each override in one variant at least."""
    chosen = [f"+experiment={experiment}", "budget=cpu"]
    seen: set[str] = set()
    for name, overrides in composed_experiment(experiment).variants.items():
        if seen.issuperset(overrides) and seen:
            continue
        seen.update(overrides)
        variant = compose([*chosen, f"name={name}", *overrides])
        assert Path(variant.run_dir).name == name


@pytest.mark.parametrize("experiment", options("experiment"))
def test_experiment_opens_with_its_command(experiment: str) -> None:
    text = (CONF / "experiment" / f"{experiment}.yaml").read_text(encoding="utf-8")
    head = text.split("\n\n")[0]
    assert f"+experiment={experiment}" in head


def test_every_setting_has_a_value_in_the_root_config() -> None:
    """Section by section; what stands in the plain config and is no setting would have been refused."""
    cfg = compose()
    sections = (cfg, cfg.quantize, cfg.fit, cfg.full_precision, cfg.synthesize, cfg.report, cfg.sweep)
    plains = (
        cfg.plain,
        *(cfg.plain[n] for n in ("quantize", "fit", "full_precision", "synthesize", "report", "sweep")),
    )
    for section, plain in zip(sections, plains, strict=True):
        assert sorted(plain) == sorted(field.name for field in fields(section) if field.name != "plain")


def test_the_uniform_allocation_is_the_default() -> None:
    assert isinstance(compose().quantize.bits.build(), Uniform)


def test_weights_have_a_scale_for_each_channel_by_default_and_inputs_one() -> None:
    quantize = compose().quantize
    assert quantize.weight.build()(spec=QuantSpec(bits=4, shape=(8, 4, 3, 3))).granularity == PerChannel(0)
    assert quantize.input.build()(spec=QuantSpec(bits=4)).granularity == PerTensor()
