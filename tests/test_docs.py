"""What the pages name exists: linked files, configs, tests, modules, result files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [path for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"))]
ROOMS = "qtrain|conf|tests|scripts|results|docs|slurm"


def linked(text: str) -> set[str]:
    """Relative targets of Markdown links and images, anchors cut off."""
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return {target.split("#")[0] for target in targets if not re.match(r"[a-z]+:|#", target)}


def named(text: str) -> set[str]:
    """Paths of the repository in backticks, such as `conf/quantizer/lsq.yaml` or `tests/test_cli.py::test_version`.

    Files called ``mine`` are those that a reader is asked to write.
    """
    paths = re.findall(rf"`((?:{ROOMS})/[\w./:-]+)`", text)
    return {path for path in paths if Path(path).stem != "mine"}


def problem(path: str) -> str | None:
    """Why ``path``, with or without ``::test``, does not exist."""
    file, _, test = path.partition("::")
    if not (ROOT / file).exists():
        return f"{file} does not exist"
    if test and f"def {test}(" not in (ROOT / file).read_text(encoding="utf-8"):
        return f"{file} has no {test}"
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in linked(page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page: Path) -> None:
    problems = {path: problem(path) for path in named(page.read_text(encoding="utf-8"))}
    assert {path: why for path, why in problems.items() if why} == {}


def test_the_checks_see_what_is_missing() -> None:
    text = "[a](nowhere.md#x) [b](https://example.org) `conf/nothing.yaml` `tests/test_docs.py::test_not_there`"
    assert linked(text) == {"nowhere.md"}
    assert {path for path in named(text) if problem(path)} == {
        "conf/nothing.yaml",
        "tests/test_docs.py::test_not_there",
    }
    assert problem("tests/test_docs.py::test_links_lead_somewhere") is None
