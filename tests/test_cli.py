"""The command line from outside: help, versions, dispatch, exit codes."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml

from qtrain import __version__, cli
from qtrain.command_help import completions, group_help, help_text
from qtrain.config.compose import compose
from qtrain.pipeline.stages import stages_of
from qtrain.settings.conf_dir import conf_dir
from qtrain.settings.run_settings import RunSettings
from qtrain.settings.tasks import TASKS
from qtrain.utils.errors import IncompleteError

QUIET = ["hydra/job_logging=none", "hydra/hydra_logging=none"]


def call(*argv: str) -> int:
    """The exit code of the command line run in this process."""
    try:
        cli.main([*argv])
    except SystemExit as done:
        return int(done.code or 0)
    return 0


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """A run sets logging up for its process; the handlers write to streams that end with the test."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Callable[[RunSettings], Any]], list[str]]:
    """Puts a function in the place of the train task; returns arguments that keep its runs in a scratch folder."""

    def put(function: Callable[[RunSettings], Any]) -> list[str]:
        monkeypatch.setitem(sys.modules, "qtrain.tasks.train", SimpleNamespace(run=function))  # type: ignore[misc]
        return [f"output={tmp_path}", *QUIET]

    return put


def test_help_is_answered_at_once() -> None:
    """Without importing what takes seconds."""
    script = """if True:
        import sys
        from qtrain import cli
        try:
            cli.main(["--help"])
        except SystemExit as done:
            print(done.code, sorted({"torch", "hydra", "ray", "numpy"} & sys.modules.keys()))
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "Tasks (task=NAME):" in done.stdout
    assert done.stdout.splitlines()[-1] in ("0 []", "None []")


def loaded_by(arguments: list[str], packages: set[str], folder: Path) -> tuple[int, list[str], str]:
    """Exit code, those of ``packages`` that a process with this command line has loaded at its end, and its output."""
    script = f"""if True:
        import sys
        from qtrain import cli
        code = 0
        try:
            cli.main({arguments!r})
        except SystemExit as done:
            code = done.code
        print("AT THE END", code, *sorted({packages!r} & sys.modules.keys()))
    """
    environment = {**os.environ, "QTRAIN_CACHE": str(folder), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    code, *found = done.stdout.partition("AT THE END")[2].split()
    return int(code), found, done.stdout + done.stderr


def test_a_mistyped_key_is_refused_before_a_heavy_package_is_loaded(tmp_path: Path) -> None:
    heavy = {"torch", "numpy", "scipy", "pytorch_lightning", "timm", "sklearn", "qtrain.pipeline"}
    code, found, output = loaded_by(["quantise.x=3"], heavy, tmp_path)
    assert (code, found) == (2, [])
    assert "unknown key 'quantise'; did you mean 'quantize'?" in output


def test_training_on_the_digits_loads_no_package_that_it_does_not_use(tmp_path: Path) -> None:
    """Lightning's torchmetrics and timm look for scipy.signal and wandb; the digits are read without scikit-learn."""
    unused = {"wandb", "sklearn", "pandas", "datasets", "pyarrow", "ray", "optuna", "onnx", "onnxruntime", "openvino"}
    unused |= {"scipy.signal", "scipy.stats", "scipy.optimize", "scipy.special", "altair"}
    short = ["data=digits", "data.max_train=64", "fit.epochs=1", "full_precision.epochs=1", "model.width=0.25"]
    arguments = [f"output={tmp_path}", "model=cifar_resnet8", "objective=hard", "trainer=cpu", *short]
    code, found, output = loaded_by(arguments, unused, tmp_path)
    assert (code, found) == (0, []), output
    assert "trained" in output


def test_help_fits_a_screen_and_names_tasks_and_groups() -> None:
    text = help_text(conf_dir())
    lines = text.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    for name in (*TASKS, "quantizer", "teacher_cache", "--help GROUP", "--help experiment"):
        assert name in text


def test_help_of_a_group_explains_its_options_by_their_first_comments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("--help", "quantizer") == 0
    shown = capsys.readouterr().out
    assert "  quantizer@quantize.weight=lsq\n" in shown
    for option in (conf_dir() / "quantizer").glob("*.yaml"):
        first = option.read_text().splitlines()[0].lstrip("# ")
        assert f"  {option.stem}\n      {first}\n" in f"{shown}\n"
    assert call("--help", "experiment") == 0
    assert "  cifar10/resnet20_w4a4\n" in capsys.readouterr().out
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "some.yaml").write_text("# @package _global_\n# Reaches 90 %.\n\n# not this\nseed: 1\n")
    assert group_help(tmp_path, "data").endswith("  some\n      Reaches 90 %.")


def test_help_of_an_unknown_group_names_a_close_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--help", "quantiser") == 2
    assert "--help: there is no group 'quantiser'; did you mean 'quantizer'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("quantizer@quantize.we", ["quantizer@quantize.weight="]),
        ("quantizer@quantize.weight=ls", ["quantizer@quantize.weight=lsq", "quantizer@quantize.weight=lsq_plus"]),
        ("+experiment=quick", ["+experiment=quickstart"]),
        ("+term@objective.terms.mine=ha", ["+term@objective.terms.mine=hard"]),
        ("teacher=se", ["teacher=self"]),
        ("task=s", ["task=sweep", "task=synthesize"]),
        ("see", ["seed="]),
        ("swe", ["sweep."]),
        ("nothing=", None),
        ("fit.ep", None),  # Hydra knows the keys
    ],
)
def test_words_are_completed(word: str, found: list[str] | None) -> None:
    assert completions(conf_dir(), word) == found


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes_groups_with_a_place_and_keys() -> None:
    script = f"""
        qtrain() {{ {sys.executable} -m qtrain "$@"; }}
        eval "$(qtrain -sc install=bash)"
        case $COMP_WORDBREAKS in *[=@]*) echo breaks;; esac
        for COMP_LINE in "qtrain data=digits observer@quantize.input_observer=min" "qtrain fit.epo"; do
            COMP_POINT=${{#COMP_LINE}}; _qtrain; echo "${{COMPREPLY[@]}}"
        done
    """
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["observer@quantize.input_observer=min_max", "fit.epochs="]


@pytest.mark.parametrize("asked", ["--version", "--help quantizer"])
def test_output_that_nobody_reads_is_no_error(asked: str) -> None:
    """As of ``| head``: the reader is gone before anything is written, whether or not the output fills a buffer."""
    reads, writes = os.pipe()
    os.close(reads)
    try:
        command = [sys.executable, "-m", "qtrain", *asked.split()]
        buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
        done = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, text=True, env=buffered)
    finally:
        os.close(writes)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_version() -> None:
    done = subprocess.run([sys.executable, "-m", "qtrain", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"qtrain {__version__}\n"


def test_tasks_have_a_run_function() -> None:
    import importlib

    for name in TASKS:
        module: ModuleType = importlib.import_module(f"qtrain.tasks.{name}")
        assert callable(module.run)


def test_dispatch_hands_over_the_composed_config(task: Any) -> None:
    seen: list[RunSettings] = []
    arguments = task(lambda cfg: seen.append(cfg) or {"top1": 1.0})
    assert call(*arguments, "seed=3", "quantize.bits.weight=2") == 0
    (cfg,) = seen
    assert cfg.seed == 3
    assert cfg.data.options["seed"] == 3
    assert Path(cfg.run_dir).name == "w2a4-seed3"


def test_stages_are_worked_out(task: Any) -> None:
    seen: list[RunSettings] = []
    chosen = [*task(seen.append), "+stages.first=['fit.epochs=1']", "+stages.second=['quantize.bits.weight=2']"]
    assert call(*chosen) == 0
    (cfg,) = seen
    assert cfg.stages["first"].fit.epochs == 1
    assert cfg.stages["second"].quantize.bits.options["weight"] == 2
    assert [stage.settings.fit.epochs for stage in stages_of(cfg, Path())] == [1, cfg.fit.epochs]


def test_files_of_the_users_own_are_found_for_variants_too(task: Any, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    mine = "# @package _global_\nexperiment: mine\nvariants: {one: [seed=1], two: [seed=2]}\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(mine)
    seeds: list[int] = []
    call(*task(lambda cfg: seeds.append(cfg.seed) or {}), f"hydra.searchpath=[file://{tmp_path}]", "+experiment=mine")
    assert seeds == [1, 2]


@pytest.mark.parametrize("name", ["student.safetensors", "my run (1)/a=b, c.st", 'a "b" \\c', "photos/*.png", "~/x"])
def test_a_students_file_and_images_have_whatever_names(name: str) -> None:
    settings = compose(cli.spelled_out(["task=predict", f"model={name}", f"images={name}"]))
    assert (settings.checkpoint, settings.images) == (name, (name,))


def test_lists_of_images_and_quoted_names_are_left_to_hydra() -> None:
    assert compose(cli.spelled_out(["task=predict", "images=[a.png,'b, c']"])).images == ("a.png", "b, c")
    assert compose(cli.spelled_out(["task=predict", "images='a, b'", 'model="c"'])).images == ("a, b",)


def test_model_is_a_group_unless_images_are_predicted() -> None:
    assert cli.spelled_out(["model=resnet18", "task=train"]) == ["model=resnet18", "task=train"]


def test_cfg_shows_what_prediction_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--cfg", "job", "task=predict", "model=a b.safetensors", "images=photos") == 0
    shown = capsys.readouterr().out
    assert "\ncheckpoint: a b.safetensors\n" in shown
    assert "\nimages:\n- photos\n" in shown


def test_multirun_runs_each_value_in_a_folder_of_its_own(task: Any) -> None:
    seen: list[str] = []
    arguments = task(lambda cfg: seen.append(str(cfg.run_dir)) or {})
    assert call("-m", *arguments, "seed=0,1", "quantize.bits.weight=4,2") == 0
    assert [Path(folder).name for folder in seen] == ["w4a4", "w2a4", "w4a4-seed1", "w2a4-seed1"]


def test_multirun_exchanges_quantizers(task: Any) -> None:
    seen: list[str] = []
    arguments = task(lambda cfg: seen.append(f"{cfg.quantize.weight.kind} {cfg.quantize.weight.get('narrow')}") or {})
    chosen = ["+experiment=cifar10/resnet20_w4a4", "quantizer@quantize.weight=dorefa,lsq_plus"]
    assert call("-m", *arguments, *chosen) == 0
    assert seen == ["DoReFa None", "LSQPlus None"]
    chosen = [chosen[0], "quantizer@quantize.weight=affine", "quantize.weight.narrow=true,false"]
    assert call("-m", *arguments, *chosen) == 0
    assert seen[2:] == ["Affine True", "Affine False"]


def test_multirun_stops_at_the_first_failure(task: Any, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[int] = []

    def fail(cfg: RunSettings) -> None:
        seen.append(cfg.seed)
        raise ValueError(f"seed {cfg.seed}\nis unlucky")

    assert call("-m", *task(fail), "seed=7,8") == 2
    assert seen == [7]
    assert capsys.readouterr().err == "qtrain: error: seed 7 is unlucky\n"


def test_interrupt_says_how_to_go_on(task: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(cfg: RunSettings) -> None:
        raise KeyboardInterrupt

    assert call(*task(interrupt)) == 130
    assert "the same command again goes on" in capsys.readouterr().err


def test_a_task_may_choose_its_exit_code(task: Any) -> None:
    def leave(cfg: RunSettings) -> None:
        raise SystemExit(143)

    assert call(*task(leave)) == 143


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("yours"), "2\n"),
        (FileNotFoundError(2, "no such file"), "2\n"),
        (OSError(errno.ESTALE, "stale file handle"), None),  # of a file server that is away, for one
        (AttributeError("ours"), None),
    ],
)
def test_a_batch_script_is_told_which_end_is_final(
    task: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, told: str | None
) -> None:
    def fail(cfg: RunSettings) -> None:
        raise error

    file = tmp_path / "exit"
    monkeypatch.setenv("QTRAIN_EXIT_FILE", str(file))
    assert call(*task(fail)) != 0
    assert (file.read_text() if file.exists() else None) == told


def test_full_error_brings_the_traceback_back(task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(cfg: RunSettings) -> None:
        raise ValueError("here")

    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match="here"):
        cli.main(task(fail))


def test_a_bug_is_not_dressed_up_as_a_users_mistake(task: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def break_down(cfg: RunSettings) -> None:
        raise AttributeError("ours")

    assert call(*task(break_down)) == 1
    assert "Traceback" in capsys.readouterr().err


def test_cfg_shows_the_config_and_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("--cfg", "job", "seed=5") == 0
    assert "seed: 5" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_cfg_shows_an_exchanged_quantizer_and_a_part_of_the_config(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["+experiment=cifar10/resnet20_w4a4", "quantizer@quantize.weight=dorefa"]
    assert call("--cfg", "job", "--package", "quantize.weight", "--resolve", *chosen) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("# @package quantize.weight\n")
    assert yaml.safe_load(shown) == {"_target_": "qtrain.quantizers.uniform.dorefa.DoReFa", "_partial_": True}
    assert call("--cfg", "job", "--package", "quantize.nothing", *chosen) == 2
    assert "--package: the config has nothing at 'quantize.nothing'" in capsys.readouterr().err


def test_an_exchanged_quantizer_is_logged(
    task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.INFO, logger="qtrain"):
        call(*task(lambda cfg: None), "+experiment=cifar10/resnet20_w4a4", "quantizer@quantize.weight=lsq_plus")
    assert "quantize.weight: lsq_plus in place of lsq, with its own options" in caplog.text


def test_a_rejected_command_leaves_no_folder_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("fit.epoch=3") == 2
    assert list(tmp_path.iterdir()) == []


def test_a_refused_run_leaves_no_folder_behind(task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even one with a line in its log; a folder with something in it stays."""
    monkeypatch.chdir(tmp_path)

    def refuse(cfg: RunSettings) -> None:
        logging.getLogger("qtrain").warning("about to be refused")
        if (checkpoints := Path(cfg.run_dir) / "checkpoints") and cfg.seed:
            checkpoints.mkdir(parents=True)
            (checkpoints / "a.ckpt").touch()
        raise ValueError("refused")

    task(refuse)
    assert call("output=some/where") == 2
    assert list(tmp_path.iterdir()) == []
    assert call("output=some/where", "seed=1") == 2
    assert "about to be refused" in (tmp_path / "some/where/adhoc/w4a4-seed1/qtrain.log").read_text()


def test_each_variant_has_a_log_of_its_own(task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "qtrain.tasks.report", SimpleNamespace(run=lambda cfg: {}))  # type: ignore[misc]
    task(lambda cfg: logging.getLogger("qtrain").info("this is %s", cfg.name) or {})
    assert call("+variants.one=['seed=1']", "+variants.two=['seed=2']", "name=mine") == 0
    logs = {path.parent.name: path.read_text() for path in tmp_path.rglob("qtrain.log")}
    assert set(logs) == {"one-mine", "two-mine"}
    assert "this is one-mine" in logs["one-mine"] and "two" not in logs["one-mine"]


def test_multirun_logs_in_the_folder_of_each_run(task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    task(lambda cfg: logging.getLogger("qtrain").info("seed %d", cfg.seed) or {})
    assert call("-m", "seed=0,1") == 0
    logs = {path.parent.name: path.read_text().rpartition(": ")[2] for path in tmp_path.rglob("qtrain.log")}
    assert logs == {"w4a4": "seed 0\n", "w4a4-seed1": "seed 1\n"}


def test_multirun_goes_on_after_a_job_that_left_something_out(task: Any, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[int] = []

    def leave_out(cfg: RunSettings) -> dict[str, float]:
        seen.append(cfg.seed)
        if cfg.seed == 0:
            raise IncompleteError("skipped 1 of 3 images")
        return {}

    assert call("-m", *task(leave_out), "seed=0,1") == 1
    assert seen == [0, 1]
    assert "qtrain: skipped 1 of 3 images\n" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "line"), [("a_file", "is a file, not a folder"), ("closed", "cannot be written to")])
def test_output_that_takes_no_folder_is_refused(
    task: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, line: str
) -> None:
    task(lambda cfg: pytest.fail("it ran"))
    (tmp_path / "a_file").touch()
    (tmp_path / "closed").mkdir()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "closed" and access(path, mode))
    assert call(f"output={tmp_path / name}") == 2
    error = capsys.readouterr().err
    assert error == f"qtrain: error: output: {tmp_path / name} {line}; give output=FOLDER, another place for runs\n"
