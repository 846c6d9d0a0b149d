"""Wrong inputs of all kinds, through the command line in this process: one line, exit code 2, nothing trained or left.

With the tables of ``tests/test_errors.py`` these are 120 and more. Each says which key or file is wrong.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qtrain import cli
from qtrain.config.compose import compose
from qtrain.pipeline import pretrain, run_folder, run_stage
from qtrain.pipeline.results import append_row
from qtrain.pipeline.run_folder import append_results
from qtrain.utils.atomic_write import NoSpaceError, atomic_write
from tests import test_errors

MINE = "hydra.searchpath=[file://.]"
DISTILL = ["teacher=cifar_resnet20", "objective=soft"]
SWEEP = ["task=sweep", "+sweep.space.seed=[1]"]

WRONG: dict[str, tuple[list[str], str]] = {
    "no epochs": (["fit.epochs=-1"], "fit.epochs: must be at least 0, got -1"),
    "no epochs of pretraining": (["full_precision.epochs=-1"], "full_precision.epochs: must be at least 0, got -1"),
    "a negative rate": (["optimizer.lr=-1"], "optimizer.lr: must be at least 0, got -1"),
    "a rate that is no number": (["optimizer.lr=nan"], "optimizer.lr: must be at least 0, got nan"),
    "negative momentum": (["optimizer.momentum=-0.1"], "optimizer.momentum: must be at least 0"),
    "negative decay": (["optimizer.weight_decay=-1e-4"], "optimizer.weight_decay: must be at least 0"),
    "a negative rate of pretraining": (["full_precision.optimizer.lr=-1"], "full_precision.optimizer.lr: must be"),
    "a negative rate of scales": (["fit.scale_lr=-1"], "fit.scale_lr: must be at least 0, got -1"),
    "a negative rate of a teacher": (["teacher.lr=-1"], "teacher.lr: must be at least 0, got -1"),
    "a huge seed": (["seed=99999999999999999999999"], "seed: must be in [0, 4294967296), got 99999999999999999999999"),
    "a negative seed": (["seed=-1"], "seed: must be in [0, 4294967296), got -1"),
    "more than a whole fit": (["fit.share=2"], "fit.share: must be in (0, 1], got 2.0"),
    "clipping to nothing": (["fit.clip_norm=0"], "fit.clip_norm: must be above 0, got 0.0"),
    "an average that never moves": (["fit.weight_average=1"], "fit.weight_average: must be in [0, 1), got 1.0"),
    "a row each no steps": (["fit.log_every_steps=0"], "fit.log_every_steps: must be at least 1, got 0"),
    "a point each no steps": (["fit.checkpoint_every_steps=0"], "fit.checkpoint_every_steps: must be at least 1"),
    "health before the first step": (["fit.health_every_steps=-1"], "fit.health_every_steps: must be at least 0"),
    "negative batches": (["fit.reestimate_bn=-1"], "fit.reestimate_bn: must be at least 0, got -1"),
    "calibration on nothing": (["quantize.calibration_batches=0"], "quantize.calibration_batches: must be at least 1"),
    "validation never": (["trainer.check_val_every_n_epoch=0"], "trainer.check_val_every_n_epoch: must be at least 1"),
    "a negative weight": (["distill.hard=-1"], "distill.hard: must be at least 0, got -1.0"),
    "a frozen temperature": ([*DISTILL, "distill.temperature=0"], "distill.temperature: must be above 0, got 0.0"),
    "a layer that the student has not": (
        ["teacher=cifar_resnet20", "objective=hint", "distill.student_layers=[layer9]"],
        "layer9",
    ),
    "a layer that the teacher has not": (
        ["teacher=cifar_resnet20", "objective=hint", "distill.teacher_layers=[layer9]"],
        "objective: FeatureTaps: CifarResNet has no layer 'layer9'",
    ),
    "a layer that a member of the teacher has not": (
        ["teacher=ensemble", "objective=hint", "distill.teacher_layers=[second.layer9]"],
        "has no layer 'second.layer9'",
    ),
    "an observer without histogram": (
        ["quantizer@quantize.input=weighted_log", "observer@quantize.input_observer=min_max"],
        "quantize.input: WeightedLog: needs a histogram of its input",
    ),
    "bits below one": (
        ["quantize.bits.weight=0"],
        "quantize.bits.weight: must be 1..16 bits, or 32 for full precision",
    ),
    "bits above all": (["quantize.bits.input=33"], "quantize.bits.input: must be 1..16 bits, or 32 for full precision"),
    "bits of the first layer": (["quantize.bits.first.weight=99"], "quantize.bits.first.weight: must be 1..16 bits"),
    "no quantization by deleting it": (["~quantize"], "~quantize: every run needs 'quantize'; quantize.enabled=false"),
    "no fit": (["~fit"], "~fit: every run needs 'fit'"),
    "no data": (["~data"], "~data: every run needs 'data'; give data=... another value"),
    "no seed": (["~seed"], "~seed: every run needs 'seed'"),
    "no teacher by deleting it": (["~teacher"], "~teacher: every run needs 'teacher'; teacher=none"),
    "a folder of configs that is not there": (
        ["hydra.searchpath=[file:///nowhere]", "+experiment=mine"],
        "hydra.searchpath: there is no folder /nowhere; give a folder of configs, as in [file:///home/me/conf]",
    ),
    "a folder of configs without its scheme": (["hydra.searchpath=[conf]"], "hydra.searchpath: 'conf' is no place"),
    "tabs in YAML": ([MINE, "+experiment=tabs"], "tabs.yaml, line 3: there is a tab; YAML is indented by spaces"),
    "an object in YAML": (
        [MINE, "+experiment=object"],
        "object.yaml, line 2: the tag '!!python/object/apply:os.system'",
    ),
    "broken YAML": ([MINE, "+experiment=broken"], "broken.yaml, line 3: expected ',' or ']'"),
    "bytes for YAML": ([MINE, "+experiment=bytes"], "a YAML file of the config is no text in UTF-8"),
    "an empty group": ([MINE, "+experiment="], "experiment"),
    "an equals sign in a path": (
        ["model.weights=weights=1.th"],
        "model.weights: weights=1.th holds characters that need quotes; in a shell write 'model.weights=\"weights",
    ),
    "brackets in a path": (["model.weights=a (1).th"], "in a shell write 'model.weights=\"a (1).th\"'"),
    "an open list": (["select=[a"], "select: [a cannot be read as a list, a mapping or a text"),
    "an open mapping": (["fit={epochs: 1"], "fit: {epochs: 1 cannot be read as a list"),
    "a lone quote": (["'"], "is no setting; give key=value"),
    "an experiment without its plus": (
        ["experiment=quickstart"],
        "experiment=quickstart: an experiment is added by a plus: +experiment=quickstart",
    ),
    "a grouping of one's own": (["experiment=lab"], "runs of your own are kept together by output=outputs/lab"),
    "a choice of no variants": (["select=[a]"], "select: there are no variants"),
    "a name outside": (["name='../../x'"], "name: '../../x' leaves the folder of the experiment"),
    "a file for a folder": (["output=a_file"], "a_file is a file, not a folder; give output=FOLDER"),
    "a file on the way to a folder": (["output=a_file/runs"], "a_file is a file, not a folder; give output=FOLDER"),
    "a folder that cannot be made": (["output=/proc/nowhere"], "output: cannot make /proc/nowhere"),
    "a cache that cannot be written": (
        ["full_precision.folder=/proc/nowhere"],
        "full_precision.folder: cannot write to",
    ),
    "results with another header": (["results=other.csv"], "results: other.csv does not start with the columns date,"),
    "a folder for results": (["results=."], "results: . is a folder; give a CSV file"),
    "results below a file": (["results=a_file/x.csv"], "results: cannot write to a_file/x.csv"),
    "results of an evaluation": (["task=evaluate", "results=.", "model.weights=nan.pt"], "results: . is a folder"),
    "results of a sweep": ([*SWEEP, "results=."], "results: . is a folder; give a CSV file"),
    "weights that are not finite": (
        ["model.weights=nan.pt"],
        "nan.pt: tensor 'conv1.weight' holds values that are not",
    ),
    "a sweep of no trials": ([*SWEEP, "sweep.trials=0"], "sweep.trials: must be at least 1, got 0"),
    "a flag without its value": (["--cfg"], "argument --cfg/-c: expected one argument; see python -m qtrain --help"),
    "a flag with a wrong value": (["--cfg", "nothing"], "argument --cfg/-c: invalid choice: 'nothing'"),
    "a short flag": (["-x"], "unrecognized arguments: -x"),
    "one wrong job of several": (["-m", "seed=0,x"], "seed: Value 'x' of type 'str' could not be converted to Integer"),
    "two jobs in one folder": (["-m", "seed=0,0"], "-m: jobs 0 and 1 would both write to"),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with files of all kinds, in which nothing can be trained."""

    def train(*arguments: object, **options: object) -> None:
        pytest.fail("it was about to train")

    monkeypatch.setattr(pretrain, "fit", train)
    monkeypatch.setattr(run_stage, "fit", train)
    monkeypatch.setenv("QTRAIN_CACHE", str(tmp_path.parent / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiment").mkdir()
    for name, text in {
        "tabs": "fit:\n\tepochs: 1\n",
        "object": "seed: !!python/object/apply:os.system [exit]\n",
        "broken": "fit: [1\n",
    }.items():
        (tmp_path / "experiment" / f"{name}.yaml").write_text(f"# @package _global_\n{text}")
    (tmp_path / "experiment" / "bytes.yaml").write_bytes(b"\xff\xfe")
    (tmp_path / "a_file").touch()
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    torch.save({"conv1.weight": torch.full((16, 1, 3, 3), float("nan"))}, tmp_path / "nan.pt")
    return tmp_path


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_ends_in_one_line(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, line = WRONG[name]
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as done:
        cli.main(arguments if arguments[0].startswith("-") else [*arguments, "hydra/job_logging=none"])
    error = capsys.readouterr().err
    assert done.value.code == 2
    assert re.fullmatch(r"qtrain: error: [^\n]+\n", error), error
    assert line in error
    assert sorted(path for path in folder.rglob("*") if not path.name.endswith(".lock")) == before


def test_wrong_inputs_are_many() -> None:
    tables = (WRONG, test_errors.WRONG, test_errors.RUN_INTO, test_errors.REFUSED)
    assert sum(map(len, tables)) >= 120


def test_bits_out_of_range_are_found_before_torch_is_loaded() -> None:
    import subprocess
    import sys

    script = """if True:
        import sys
        from qtrain import cli
        try:
            cli.main(["quantize.bits.weight=0"])
        except SystemExit as done:
            print(done.code, "torch" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "2 False\n"


@pytest.mark.parametrize("kind", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed")])
def test_full_disk_is_called_by_its_name(kind: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch says nothing of space: then the space that is left does."""
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 0}))
    (tmp_path / "a").write_text("before")
    with (
        pytest.raises(NoSpaceError, match=r"no space left on the disk of .*: a was not written; make room"),
        atomic_write(tmp_path / "a"),
    ):
        raise kind
    assert (tmp_path / "a").read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_other_errors_of_writing_are_not_called_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="other"), atomic_write(tmp_path / "a"):
        raise RuntimeError("other")


def test_summary_does_not_depend_on_the_users_results_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The row of the run stands in its folder; that the other file failed is said."""
    write: Callable[..., None] = append_row

    def fail(path: Path | str, row: dict[str, object]) -> None:
        if Path(path).name == "mine.csv":
            raise OSError(28, "No space left on device")
        write(path, row)

    monkeypatch.setattr(run_folder, "append_row", fail)
    settings = compose([f"results={tmp_path / 'mine.csv'}"])
    append_results(settings, tmp_path, {"top1": 90.0}, device=torch.device("cpu"), notes="")
    assert "90" in (tmp_path / "results.csv").read_text()
    assert "No space left on device; the row of this run is in" in caplog.text


def test_variable_names_the_folder_of_cifar10(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QTRAIN_CIFAR10", "/data/cifar10")
    assert compose(["data=cifar10"]).data.options["root"] == "/data/cifar10"
    monkeypatch.delenv("QTRAIN_CIFAR10")
    assert compose(["data=cifar10"]).data.options["root"] is None


def test_writing_probe_leaves_no_file(tmp_path: Path) -> None:
    from qtrain.utils.checks import check_writable

    check_writable(tmp_path / "new", "full_precision.folder")
    assert os.listdir(tmp_path / "new") == []
