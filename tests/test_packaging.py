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
    assert "cifar_resnet20" in run("--help")
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
