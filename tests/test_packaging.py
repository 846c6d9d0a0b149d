"""A wheel is complete: configs and templates inside, and the command works far from the checkout."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from qtrain import __version__


@pytest.fixture(scope="module")
def wheel(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=repo, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_carries_all_configs_and_templates(wheel: Path, repo: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert wheel.name.startswith(f"qtrain-{__version__}-")
    expected = {f"qtrain/{path.relative_to(repo).as_posix()}" for path in (repo / "conf").rglob("*.yaml")}
    expected |= {path.relative_to(repo).as_posix() for path in (repo / "qtrain").rglob("*.j2")}
    expected |= {path.relative_to(repo).as_posix() for path in (repo / "qtrain").rglob("*.py")}
    assert expected <= inside
    assert not any(name.startswith(("tests/", "conf/", "scripts/")) for name in inside)


@pytest.mark.slow
def test_command_works_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(site)}

    def run(*argv: str) -> str:
        command = [sys.executable, "-c", "import qtrain.cli, sys; print(qtrain.cli.__file__); qtrain.cli.main()", *argv]
        done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert str(site) in run("--version"), "the test must not see the checkout"
    assert "cifar_resnet20" in run("--help", "model")
    assert "w4a4" not in run("--cfg", "job", "name=here")


def test_constraints_pin_every_dependency(repo: Path) -> None:
    project = tomllib.loads((repo / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(line for extra in ("data", "wandb", "test") for line in extras(project, extra)),
    ]
    pinned = re.findall(r"^([\w.-]+)==", (repo / "constraints.txt").read_text(), flags=re.MULTILINE)
    names = {canonical(re.split(r"[<>=\[ ]", line)[0]) for line in wanted} - {"qtrain"}
    assert names <= {canonical(name) for name in pinned}


def extras(project: dict[str, dict[str, list[str]]], name: str) -> list[str]:
    return project["optional-dependencies"][name]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.slow
def test_a_plain_installation_trains_and_calibrates(tmp_path: Path) -> None:
    """The embedded data needs no extra: the README's first command works without any."""
    small = "trainer=cpu model=cifar_resnet8 model.width=0.25 data.max_train=64 data.max_test=32 fit.epochs=1"
    train = [*small.split(), "full_precision.epochs=1", f"full_precision.folder={tmp_path / 'weights'}", "name=run"]
    program = (
        "import sys\n"
        "extras = ('pyarrow', 'datasets', 'wandb', 'wandb_workspaces', 'ray', 'optuna', 'submitit')\n"
        "extras += ('onnx', 'onnx_ir', 'onnxruntime', 'onnxscript', 'openvino')\n"
        "sys.modules |= dict.fromkeys(extras)\n"
        "from qtrain.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    done = subprocess.run([sys.executable, "-c", program, *train], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "outputs" / "adhoc" / "run" / "student.safetensors").is_file()
    done = subprocess.run(
        [sys.executable, "-c", program, "task=sweep", "+sweep.space.seed=[0,1]"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    missing = r"qtrain: error: task=sweep: (ray|optuna) is not installed; pip install 'qtrain\[sweep\]'"
    assert re.search(missing, done.stderr)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
    lone = ["task=export", "checkpoint=outputs/adhoc/run"]
    done = subprocess.run([sys.executable, "-c", program, *lone], cwd=tmp_path, capture_output=True, text=True)
    missing = r"qtrain: error: task=export: onnx\w* is not installed; pip install 'qtrain\[export\]'"
    assert re.search(missing, done.stderr)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
    command = [sys.executable, "-c", program, "data=synthetic", "data.test=null", "data.name=mine", "data.mean=[0.5]"]
    done = subprocess.run(
        [*command, "data.std=[0.5]", "data.in_channels=1", "task=synthesize", "model.weights=none.th"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
