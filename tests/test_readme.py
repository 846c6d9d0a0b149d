"""What the README tells a newcomer to type is right."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qtrain.cli import spelled_out
from qtrain.config.compose import compose
from qtrain.run_task import run_task

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def shell_lines(page: Path) -> list[str]:
    """Command lines of a page's ``sh`` blocks, continued lines joined, comments and blank lines left out."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]


LINES = [(page.name, line) for page in PAGES for line in shell_lines(page)]
COMMANDS = sorted({line for _, line in LINES if re.search(r"(^|\s)(-m qtrain|qtrain) ", line)})
TARGETS = sorted({word for _, line in LINES if line.startswith("make ") for word in line.split("#")[0].split()[1:]})


@pytest.fixture(scope="module", autouse=True)
def own_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The Python files that the README shows, where Python finds them."""
    folder = tmp_path_factory.mktemp("own")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, code in re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        (folder / name).write_text(code, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield folder
    sys.modules.pop("mypackage", None)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_composes(command: str) -> None:
    words = shlex.split(command, comments=True)
    words = words[words.index("qtrain") + 1 :]
    if {"--help", "--version"} & set(words):
        return
    if "-m" in words:
        words = [re.sub(r"=([^\[,]+),.*", r"=\1", word) for word in words]
    compose(spelled_out([word for word in words if not word.startswith("-") and word != "job"]))


@pytest.mark.parametrize("target", TARGETS)
def test_make_target_exists(target: str) -> None:
    if "=" not in target:
        assert re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def test_the_readme_gives_the_two_commands_and_the_pip_lines() -> None:
    lines = shell_lines(ROOT / "README.md")
    text = "\n".join(lines)
    assert {"quickstart", "test"} <= set(TARGETS)
    assert "pip install -e . -c constraints.txt" in text
    assert "python -m qtrain +experiment=quickstart" in text
    export = "python -m qtrain task=export checkpoint=outputs/quickstart/w2a2-distill"
    assert export in text
    recipe = (ROOT / "Makefile").read_text().partition("\nquickstart:")[2].partition("\n\n")[0]
    assert [line.partition("python ")[2] for line in recipe.splitlines()[1:]] == [
        "-m qtrain +experiment=quickstart", export.partition("python ")[2],
    ]  # fmt: skip


def test_the_model_of_the_readme_is_calibrated_on_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = next(command for command in COMMANDS if "task=calibrate model=own" in command)
    words = [*shlex.split(command.partition(" -m qtrain ")[2]), "logger=none", "data.workers=0"]
    torch.save(importlib.import_module("mypackage").Net().state_dict(), "net.pth")
    assert run_task(compose(words), words)["top1"] is not None


def test_paths_in_shell_lines_exist() -> None:
    for page, line in LINES:
        for word in shlex.split(line, comments=True):
            if re.fullmatch(r"(scripts|conf|docs|tests|slurm)/[\w./-]+", word):
                assert (ROOT / word).exists(), f"{page}: {line}"
