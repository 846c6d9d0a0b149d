"""Damaged, foreign and newer files end each task that reads them in one line, with exit code 2."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

import qtrain
from qtrain.config.compose import compose
from qtrain.run_task import run_task
from qtrain.utils.errors import ConfigError
from tests.packed.test_damaged_files import recomputed

Damage = Callable[[Path], bytes]

STUDENT: dict[str, tuple[Damage, str]] = {
    "empty": (lambda file: b"", "is damaged"),
    "no student": (lambda file: b"a text, and no student", "is damaged"),
    "truncated": (lambda file: file.read_bytes()[:-9], "is damaged"),
    "with a wrong byte": (lambda file: file.read_bytes()[:-1] + b"\xa5", "is damaged or was changed"),
    "newer": (
        lambda file: recomputed(file, lambda plain, _: plain.update(format_version=99)),
        "has version 99 of the format, this qtrain reads 2 and 3; update qtrain",
    ),
}
"""Kind of damage -> what the file holds then, and what is said of it."""


def newer(file: Path) -> bytes:
    model = onnx.load(file)
    model.opset_import[0].version = 999
    return model.SerializeToString()


ONNX: dict[str, tuple[Damage, str]] = {
    "empty": (lambda file: b"", "is damaged or no ONNX model"),
    "no model": (lambda file: b"a text, and no model", "is damaged or no ONNX model"),
    "truncated": (lambda file: file.read_bytes()[:-9], "export it anew"),
    "newer": (newer, "the file has opset 999"),
}


def refused(folder: Path, task: str) -> str:
    """The line in which ``task`` ends for the run in ``folder``."""
    images = folder / "images"
    images.mkdir(exist_ok=True)
    given = ["export.images=4", f"images=[{images}]", f"output={folder.parent}"]
    with pytest.raises(ConfigError) as caught:
        run_task(compose([f"task={task}", f"checkpoint={folder}", *given]))
    line = str(caught.value)
    assert line.isprintable() and len(line) < 400, line
    return line


@pytest.mark.parametrize("task", ["export", "verify", "benchmark", "evaluate", "predict"])
@pytest.mark.parametrize("damage", STUDENT)
def test_a_damaged_student_ends_a_task_in_one_line(run_folder: Path, tmp_path: Path, task: str, damage: str) -> None:
    folder = shutil.copytree(run_folder, tmp_path / "made", ignore=shutil.ignore_patterns("export"))
    file, (made, said) = folder / "student.safetensors", STUDENT[damage]
    file.write_bytes(made(file))
    line = refused(folder, task)
    assert str(file) in line and said in line
    assert not (folder / "export").exists()


@pytest.mark.parametrize("damage", STUDENT)
def test_a_damaged_student_is_not_loaded(run_folder: Path, tmp_path: Path, damage: str) -> None:
    file, (made, said) = tmp_path / "student.safetensors", STUDENT[damage]
    file.write_bytes(made(run_folder / "student.safetensors"))
    with pytest.raises(ValueError, match=said) as caught:
        qtrain.load(file)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("task", ["export", "evaluate", "predict"])
def test_a_folder_in_the_place_of_a_student_ends_a_task_in_one_line(
    run_folder: Path, tmp_path: Path, task: str
) -> None:
    folder = shutil.copytree(run_folder, tmp_path / "made", ignore=shutil.ignore_patterns("export"))
    (folder / "student.safetensors").unlink()
    (folder / "student.safetensors").mkdir()
    assert "student.safetensors" in refused(folder, task)


@pytest.fixture(scope="module")
def exported(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "made"
    shutil.copytree(run_folder, folder, ignore=shutil.ignore_patterns("export"))
    run_task(compose(["task=export", f"checkpoint={folder}", "export.images=4", f"output={folder.parent}"]))
    return folder


@pytest.mark.parametrize("task", ["verify", "benchmark"])
@pytest.mark.parametrize("damage", ONNX)
def test_a_damaged_export_ends_a_task_in_one_line(exported: Path, tmp_path: Path, task: str, damage: str) -> None:
    folder = shutil.copytree(exported, tmp_path / "made")
    file, (made, said) = folder / "export" / "model.onnx", ONNX[damage]
    file.write_bytes(made(file))
    line = refused(folder, task)
    assert line.startswith(str(file)) and said in line
