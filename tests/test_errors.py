"""What a user can get wrong ends in one line: what, where, and what would be right. Exit code 2, no traceback."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from enum import Enum
from pathlib import Path

import pytest

from qtrain import cli
from qtrain.config.compose import compose
from qtrain.config.targets import ADMITTED, admits, check_targets, describe_hint, resolve_target
from qtrain.pipeline import prepare
from qtrain.pipeline.load_data import load_data
from qtrain.spec import QuantSpec
from qtrain.utils.errors import ConfigError

WRONG = {
    "unknown key": (["fit.epoch=3"], "unknown key 'fit.epoch'; did you mean 'fit.epochs'?"),
    "unknown root key": (["modle=x"], "unknown key 'modle'; did you mean 'model'?"),
    "key added with +": (["+fit.epoch=3"], "unknown key 'fit.epoch'; did you mean 'fit.epochs'?"),
    "key added with ++": (["++a.b=1"], "unknown key 'a'"),
    "group mistaken for a key": (["+optimzer=sgd"], "unknown key 'optimzer'; did you mean 'optimizer'?"),
    "key given twice": (["+seed=3"], "Could not append to config. An item is already at 'seed'"),
    "wrong type": (["seed=abc"], "seed: Value 'abc' of type 'str' could not be converted to Integer"),
    "wrong type in a section": (["fit.final_test=perhaps"], "fit.final_test: Value 'perhaps'"),
    "null where none may be": (["output=null"], "output: "),
    "unknown option": (["data=cifr10"], "data=cifr10: there is no such data; did you mean 'cifar10'? (available: "),
    "unknown optimizer": (["optimizer=sgdd"], "optimizer=sgdd: there is no such optimizer; did you mean 'sgd'?"),
    "unknown quantizer": (["quantizer@quantize.weight=lsqq"], "quantizer=lsqq: there is no such quantizer"),
    "unknown experiment": (
        ["+experiment=cifar10/resnet20_w4a"],
        "experiment=cifar10/resnet20_w4a: there is no such experiment; did you mean 'cifar10/resnet20_w4a4' or ",
    ),
    "experiment without its folder": (
        ["+experiment=resnet20_w4a4"],
        "experiment=resnet20_w4a4: there is no such experiment; did you mean 'cifar10/resnet20_w4a4' or ",
    ),
    "group at two places": (["quantizer=lsq"], "Did you mean to override one of quantizer@quantize.input"),
    "missing value": (["model=timm"], "missing: give model.name=..."),
    "unknown task": (
        ["task=tain"],
        "task: must be one of train, lint, allocate, sweep, calibrate, synthesize, evaluate, predict, export, verify, "
        "benchmark, profile, report, review, got 'tain'; "
        "did you mean 'train'?",
    ),
    "unknown budget": (["budget=gpu"], "budget: must be one of full, cpu, probe, got 'gpu'"),
    "unknown term": (
        ["+term@objective.terms.a=attentoin"],
        "term=attentoin: there is no such term; did you mean 'attention'?",
    ),
    "a weight of the wrong type": (["objective.terms.hard.weight=much"], "objective.terms.hard.weight: Hard takes"),
    "unknown kind of cache": (
        ["teacher_cache=ful"],
        "teacher_cache=ful: there is no such teacher_cache; did you mean 'full'?",
    ),
    "unknown key of the cache": (["teacher.cache.size=1"], "unknown key 'teacher.cache.size'; did you mean"),
    "a teacher that learns in shards": (
        ["teacher.learns=true", "teacher.shard=true"],
        "teacher.shard: a teacher that learns",
    ),
    "a compiled student in shards": (
        ["fit.shard=true", "fit.compile=true"],
        "fit.shard: fit.compile=true is for a student that is whole on each process",
    ),
    "a way to compile that does not exist": (
        ["fit.compile=perhaps"],
        "fit.compile: must be true, false or auto, got 'perhaps'",
    ),
    "a clipped student in shards": (["fit.shard=true", "fit.clip_norm=1.0"], "fit.shard: fit.clip_norm is for"),
    "shards by a strategy of one's own": (["fit.shard=true", "trainer.strategy=fsdp"], "trainer.strategy=fsdp is for"),
    "unknown way to fold": (
        ["quantize.fold=befor"],
        "quantize.fold: must be one of none, before, training, got 'befor'; did you mean 'before'?",
    ),
    "unknown rounding": (["rounding@quantize.rounding=adaroun"], "there is no such rounding; did you mean 'adaround'?"),
    "an option without its group": (
        ["quantize.weight=lsq"],
        "quantize.weight: lsq is an option of the group quantizer; write quantizer@quantize.weight=lsq",
    ),
    "an option in a place of its own": (
        ["quantize.weight_wrapper=pruned"],
        "+quantizer@quantize.weight_wrapper=pruned",
    ),
    "an option with a typo and without its group": (["lr_schedule=cosin"], "got 'cosin'; did you mean 'cosine'?"),
    "a new budget without a plus": (
        ["allocate.budgets.latency=80%"],
        "; a new one is added by a plus: +allocate.budgets.latency=...",
    ),
    "null for a group": (["optimizer=null"], "optimizer: must be a choice from a group, and not null"),
    "null for a group's place": (["quantizer@quantize.weight=null"], "quantize.weight: must be a choice from a group"),
    "null for a choice": (["quantize.weight=null"], "and not null; write quantizer@quantize.weight=..."),
    "null for a schedule": (["lr_schedule=null"], "and not null; write schedule@lr_schedule=..."),
    "null for a search": (["sweep.search=null"], "and not null; write search@sweep.search=..."),
    "a number for a choice": (["quantize.bits=4"], "a choice from the group allocate stands here, got 4"),
    "a list for a choice": (["quantize.bits=[3]"], "override quantize.bits=[3]: Cannot merge DictConfig with"),
    "a word for a mapping of terms": (["objective.terms=soft"], "objective.terms: Objective takes Mapping"),
    "a number for a section": (["quantize=3"], "int is not a subclass of QuantizeSettings"),
    "a typo in a stage": (["+stages.a=['fit.epoch=3']"], "stages.a: unknown key 'fit.epoch'; did you mean"),
    "a stage of another seed": (["+stages.a=['seed=3']"], "stages.a: changes seed, which all stages of a run share"),
    "no equals sign": (["seed"], "'seed' is no setting; give key=value"),
    "unknown flag": (["--sead", "3"], "unrecognized arguments: --sead; see python -m qtrain --help"),
    "another config folder": (
        ["--config-dir", "x"],
        "--config-dir is not for qtrain; configs of your own: hydra.searchp",
    ),
    "pickled config": (["--experimental-rerun", "x.pickle"], "--experimental-rerun is not for qtrain"),
    "sweep without -m": (["seed=1,2"], "Ambiguous value for argument 'seed=1,2'"),
    "dead interpolation": (["name='${nowhere}'"], "Interpolation key 'nowhere' not found"),
    "unknown argument": (["+optimizer.lrr=1"], "optimizer.lrr: SGD has no such argument; did you mean 'lr'?"),
    "argument of wrong type": (["optimizer.lr=fast"], "optimizer.lr: SGD takes float or Tensor"),
    "float for an int": (["quantize.bits.weight=2.5"], "quantize.bits.weight: Uniform takes int, got 2.5"),
    "argument taken away": (["~quantize.bits.weight"], "quantize.bits: Uniform needs weight"),
    "string for a nested object": (["quantize.bits.first=8"], "quantize.bits.first: Uniform takes LayerBits"),
    "target outside the list": (["optimizer._target_=os.system"], "optimizer._target_: 'os.system' is not admitted"),
    "target behind an alias": (
        ["optimizer._target_=torch.nn.functional.os.system"],
        "optimizer._target_: cannot import",
    ),
    "target that fetches code": (["optimizer._target_=torch.hub.load"], "'torch.hub.load' is not admitted"),
    "target that unpickles": (["optimizer._target_=torch.load"], "'torch.load' is not admitted"),
    "target with a typo": (["optimizer._target_=torch.optim.SGDD"], "torch.optim has no 'SGDD'; did you mean 'SGD'?"),
    "target that is no name": (["optimizer._target_=5"], "optimizer._target_: must be a dotted name"),
    "hydra callback": (["+hydra.callbacks.x._target_=os.system"], "hydra.callbacks.x._target_: 'os.system' is not"),
    "logging factory": (
        ["++hydra.job_logging.handlers.console.class=subprocess.Popen"],
        "hydra.job_logging.handlers.console.class: 'subprocess.Popen' is not admitted",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_ends_in_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, line = WRONG[name]
    with pytest.raises(SystemExit) as done:
        cli.main(arguments)
    captured = capsys.readouterr()
    assert done.value.code == 2
    assert captured.out == ""
    assert re.fullmatch(r"qtrain: error: [^\n]+\n", captured.err), captured.err
    assert line in captured.err


RUN_INTO = {
    "weights that are not there": (["model.weights=nowhere.th", "teacher=none"], r"nowhere\.th"),
    "data that is not there": (["data=cifar10", "data.root=nowhere"], r"nowhere"),
    "a rule of a constructor": (["data.val_fraction=1.5"], r"data: .*val_fraction must be in \[0, 1\), got 1\.5"),
    "a model that timm has not": (["model=timm", "model.name=resnet1"], r"resnet1\b.*resnet18"),
    "bits that no quantizer has": (["quantize.bits.weight=0"], r"quantize\.bits\.weight: must be 1\.\.16 bits"),
    "bits that this quantizer has not": (
        ["quantizer@quantize.weight=bwn"],
        r"layer 'conv1': BWN: bits must be 1, got 8",
    ),
    "a callback's rule": (
        ["+callback@callbacks.bits=bits", "callbacks.bits.images=0"],
        r"callbacks\.bits: BitSchedule: images must be at least 1, got 0; 16 are usual",
    ),
    "a schedule's rule": (
        ["schedule@lr_schedule=plateaus", "lr_schedule.milestones=[0.5]"],
        r"lr_schedule: Plateaus: 4 values need 3 milestones between them, got 1",
    ),
    "freezing what is not there": (
        ["fit.freeze.layers=[nowhere*]"],
        r"fit\.freeze\.layers: pattern 'nowhere\*' matches no layer with a weight",
    ),
    "a sweep over nothing": (["task=sweep"], r"sweep\.space: the space is empty, .* add a knob"),
    "a knob that is no knob": (["task=sweep", "+sweep.space.lr=0.1"], r"sweep\.space\.lr: must be a list of values"),
    "a direction that is none": (
        ["task=sweep", "+sweep.space.seed=[1]", "sweep.objectives.top1=up"],
        r"sweep\.objectives\.top1: must be max or min, got 'up'",
    ),
    "a start without its knob": (
        ["task=sweep", "+sweep.space.seed=[1]", "sweep.start=[{sed:1}]"],
        r"sweep\.start: there is no knob 'sed' in the space; did you mean 'seed'\?",
    ),
    "storage that cannot be written": (
        ["task=sweep", "+sweep.space.seed=[1]", "sweep.storage=/proc/nowhere"],
        r"sweep\.storage: cannot write to /proc/nowhere",
    ),
    "a report of nothing": (["task=report", "report.folder=nowhere"], r"nowhere"),
    "evaluate without weights": (["task=evaluate"], r"model\.weights|checkpoint"),
}
"""Mistakes that only the task itself can find."""

REFUSED = {
    "a quantizer in the wrong place": (
        ["quantizer@quantize.input=ttq", "quantize.bits.input=2", "quantize.bits.first=null"],
        r"layer 'conv1': TTQ: quantizes weights only, not an input; name another quantizer for quantize\.input",
    ),
    "one bit with a sign": (
        ["quantize.bits.weight=1", "quantize.bits.first=null"],
        r"layer 'conv1': LSQ: 1 bit\(s\) signed leave no positive code; use at least 2 bits, or a binary quantizer",
    ),
    "a group that does not divide": (
        ["granularity@quantize.weight.granularity=group", "quantize.weight.granularity.size=5"],
        r"layer 'conv1': PerGroup: size 5 does not divide 16 output channels; use one of \[1, 2, 4, 8, 16\]",
    ),
    "oscillation of what has no even steps": (
        [
            "+quantizer@quantize.weight_wrapper=oscillation",
            "quantizer@quantize.weight=power_of_two",
            "quantize.bits.weight=4",
            "quantize.bits.first=null",
            "quantize.bits.last=null",
        ],
        r"Oscillation: counts codes that are whole steps from zero, and PowerOfTwo has none; take lsq",
    ),
    "a wrapper that is none": (
        ["+quantizer@quantize.weight_wrapper=lsq"],
        r"quantize\.weight_wrapper: LSQ holds no other quantizer; take quant_noise",
    ),
    "a policy that fits nothing": (
        ["+policy@quantize.policies.head=policy", "quantize.policies.head.layers=[fc]"],
        r"quantize: policies\.head: pattern 'fc' matches no layer that can be quantized",
    ),
    "equalization without folding": (
        ["equalize@quantize.equalize=cross_layer"],
        r"^quantize\.equalize: no channel of CifarResNet can be scaled without changing the function",
    ),
    "equalization without a sweep": (
        ["equalize@quantize.equalize=cross_layer", "quantize.equalize.sweeps=0"],
        r"quantize\.equalize: CrossLayerEqualization: sweeps must be at least 1, got 0; 40 is usual",
    ),
    "an operation that is not there": (["quantize.operations.matmul=8"], r"operations\.matmul: CifarResNet has none"),
}
"""What conversion refuses, before any weight is trained: a quantizer, a layer and a setting that do not go together."""


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_quantized_is_said_before_pretraining(name: str) -> None:
    overrides, line = REFUSED[name]
    cfg = compose(overrides)
    with pytest.raises(ConfigError, match=line) as refusal:
        prepare.rehearse(cfg, load_data(cfg))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", RUN_INTO)
def test_a_task_stops_with_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, line = RUN_INTO[name]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main([*arguments, "fit.epochs=1", "hydra/job_logging=none"])
    assert stop.value.code == 2
    one_line_in(capsys.readouterr().err, line)


def test_a_process_of_its_own_stops_with_one_line(tmp_path: Path) -> None:
    arguments, line = RUN_INTO["data that is not there"]
    command = [sys.executable, "-m", "qtrain", *arguments, "fit.epochs=1", "hydra/job_logging=none"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 2, done.stderr
    one_line_in(done.stderr, line)


def one_line_in(stderr: str, pattern: str) -> None:
    errors = [text for text in stderr.splitlines() if text.startswith("qtrain: error: ")]
    assert len(errors) == 1, stderr
    assert re.search(pattern, errors[0])
    assert "Traceback" not in stderr


def experiment(folder: Path, text: str) -> list[str]:
    """Overrides that choose an experiment with ``text`` from a folder of the user's own."""
    (folder / "experiment").mkdir()
    (folder / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{text}\n")
    return [f"hydra.searchpath=[file://{folder}]", "+experiment=mine"]


def test_a_users_own_experiment_composes(tmp_path: Path) -> None:
    assert compose(experiment(tmp_path, "seed: 11")).seed == 11


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("allow_targets: [os]", "allow_targets: may be given on the command line only"),
        ("variants: {a: ['allow_targets=[os]']}", "variants.a: 'allow_targets=[os]' may be given on the command line"),
        ("variants: {a: ['+hydra.callbacks.x=1']}", "variants.a: "),
        ("hydra: {callbacks: {x: {_target_: os.system}}}", "hydra.callbacks.x._target_: "),
        ("hydra: {job_logging: {handlers: {h: {(): os.system}}}}", "hydra.job_logging.handlers.h.(): "),
        ("optimizer: {_target_: subprocess.run}", "optimizer._target_: 'subprocess.run' is not admitted"),
        ("objective: {terms: {x: {_target_: builtins.eval}}}", "objective.terms.x._target_: 'builtins.eval' is not"),
        ("fit: {epochs: '${budgets.${budget}.epochs}'}", "Interpolation key 'budgets.full.epochs' not found"),
    ],
)
def test_a_config_from_elsewhere_runs_nothing_else(tmp_path: Path, text: str, line: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose(experiment(tmp_path, text))
    assert line in str(error.value)


def test_the_command_line_may_admit_more() -> None:
    term = "+objective.terms.mine={_target_:fractions.Fraction,numerator:3}"
    with pytest.raises(ConfigError, match=r"objective\.terms\.mine\._target_: 'fractions\.Fraction' is not admitted"):
        compose([term])
    cfg = compose([term, "allow_targets=[fractions]"])
    assert cfg.objective.options["terms"]["mine"].build() == 3


def test_prefix_that_is_admitted_ends_at_a_dot() -> None:
    """``fractions.Frac`` admits neither ``fractions.Fraction`` nor, cut elsewhere, its package."""
    for prefix in ("fractions.Frac", "fraction", "fractions.Fraction.from_float"):
        with pytest.raises(ConfigError, match=r"'fractions\.Fraction' is not admitted"):
            resolve_target("fractions.Fraction", allow=[prefix])
    assert resolve_target("fractions.Fraction", allow=["fractions"]).__name__ == "Fraction"


@pytest.mark.parametrize(
    "target",
    [
        "torch.hub.load",
        "torch.load",
        "torch.package.PackageImporter",
        "torch.utils.cpp_extension.load_inline",
        "torch.distributed.run.main",
        "torch.nn.modules.module.partial",  # functools' own under another name
        "torch.optim.optimizer.defaultdict",
        "torch.nn.Module.load_state_dict",
        "pytorch_lightning.LightningModule.load_from_checkpoint",
        "pytorch_lightning.cli.LightningCLI",
        "timm.models.load_checkpoint",
        "timm.data.create_dataset",
        "qtrain.cli.sys",
        "qtrain.cli.main",  # with argv it could admit anything
        "qtrain.config.targets.resolve_target",
        "qtrain.config.compose.hydra",
        "qtrain.__main__.main",
    ],
)
def test_an_alias_does_not_get_past_the_list(target: str) -> None:
    with pytest.raises(ConfigError, match="_target_: "):
        resolve_target(target)


def test_what_is_admitted_exists() -> None:
    import importlib

    for prefix in ADMITTED:
        assert importlib.import_module(prefix)


class Letter(Enum):
    A = "first"


OBJECT = {"_target_": "qtrain.spec.QuantSpec", "bits": 4}


def make(
    *,
    whole: int = 1,
    real: float = 1.0,
    flag: bool = False,
    word: str = "",
    maybe: float | None = None,
    pair: tuple[int, int] = (0, 0),
    many: list[str] = [],  # noqa: B006 - never called
    table: dict[str, int] = {},  # noqa: B006 - never called
    file: Path = Path(),
    letter: Letter = Letter.A,
    bits: QuantSpec | None = None,
    specs: Sequence[QuantSpec] = (),
) -> None:
    """A signature with one argument of each kind."""


@pytest.mark.parametrize(
    ("argument", "value", "right"),
    [
        ("whole", 3, True),
        ("whole", True, False),
        ("whole", 3.0, False),
        ("real", 3, True),
        ("real", "3", False),
        ("real", True, False),
        ("flag", 1, False),
        ("word", None, False),
        ("maybe", None, True),
        ("maybe", [1.0], False),
        ("pair", [1, 2], True),
        ("pair", [1, 2, 3], False),
        ("pair", 1, False),
        ("many", ["a"], True),
        ("many", "a", False),
        ("many", [1], False),
        ("table", {"a": 1}, True),
        ("table", {"a": "b"}, False),
        ("file", "a/b", True),
        ("file", 3, False),
        ("letter", "A", True),
        ("letter", "a", False),
        ("letter", ["A"], False),
        ("bits", OBJECT, True),
        ("bits", {"bits": 4}, False),
        ("bits", 4, False),
        ("real", OBJECT, False),
        ("specs", [OBJECT, OBJECT], True),
        ("specs", [OBJECT, 4], False),
    ],
)
def test_types_of_arguments(argument: str, value: object, right: bool) -> None:
    import typing

    assert admits(typing.get_type_hints(make)[argument], value) is right


def test_types_are_described_as_yaml_writes_them() -> None:
    assert describe_hint(float | None) == "float or null"
    assert describe_hint(tuple[int, int]) == "tuple[int, int]"


def test_arguments_given_by_the_caller_are_not_missing() -> None:
    node = {"_target_": "qtrain.spec.QuantSpec"}
    with pytest.raises(ConfigError, match="x: QuantSpec needs bits"):
        check_targets(node, where="x")
    check_targets(node, where="x", given=("bits",))
