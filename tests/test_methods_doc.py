"""docs/methods.md keeps its word: each method that it says works has a config that composes, a test, and a result."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest

from qtrain.config.compose import compose
from qtrain.settings.conf_dir import conf_dir

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "methods.md"
COLUMNS = ["Method", "Type", "Config", "Test", "Result"]


class Method(NamedTuple):
    """One row of a table whose columns are ``COLUMNS``; cells in Markdown."""

    name: str
    type: str
    config: str
    test: str
    result: str

    @property
    def overrides(self) -> list[str]:
        return re.findall(r"`([^`]+)`", self.type)

    @property
    def configs(self) -> list[str]:
        return re.findall(r"`(conf/[^`]+)`", self.config)

    @property
    def tests(self) -> list[str]:
        return re.findall(r"`(tests/[^`]+)`", self.test)


def methods(text: str) -> list[Method]:
    rows, inside = [], False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
        if cells == COLUMNS:
            inside = True
        elif not cells:
            inside = False
        elif inside and not set(line) <= set("|-: "):
            assert len(cells) == len(COLUMNS), f"{line}: needs {len(COLUMNS)} cells"
            rows.append(Method(*cells))
    return rows


def anchors(text: str) -> dict[str, str]:
    """Heading, as links name it -> what stands below it, up to the next heading."""
    parts = re.split(r"^#+ +(.+)$", text, flags=re.MULTILINE)
    return {
        re.sub(r"[^\w-]", "", h.lower().replace(" ", "-")): body
        for h, body in zip(parts[1::2], parts[2::2], strict=True)
    }


TEXT = PAGE.read_text(encoding="utf-8")
METHODS = methods(TEXT)


def test_the_page_has_rows() -> None:
    assert len(METHODS) > 10
    assert len({method.name for method in METHODS}) == len(METHODS)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name[:40])
def test_method_composes_from_its_config(method: Method) -> None:
    assert method.overrides and len(method.configs) == 1, "say what to type, and which file says how"
    file = Path(method.configs[0]).relative_to("conf")
    assert (conf_dir() / file).is_file()
    cfg = compose(method.overrides)
    if file != Path("config.yaml"):
        chosen = [override for override in method.overrides if re.search(rf"[=/]{file.stem}$", override)]
        group = file.parts[0]
        assert any(re.match(rf"\+?{group}[@=]", choice) for choice in chosen) or is_default(file), (
            f"what to type does not choose {file}"
        )
    assert cfg is not None


def is_default(file: Path) -> bool:
    """Whether the root config chooses ``file`` without being told."""
    root = (conf_dir() / "config.yaml").read_text(encoding="utf-8")
    return re.search(rf"- {file.parts[0]}(@\S+)?: {file.stem}\b", root) is not None


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name[:40])
def test_method_has_its_tests(method: Method) -> None:
    assert method.tests, "name the test that holds the method against something independent"
    for path in method.tests:
        file, _, name = path.partition("::")
        assert (ROOT / file).is_file(), file
        assert not name or f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), path


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name[:40])
def test_result_leads_to_a_rendered_table(method: Method) -> None:
    (anchor,) = re.findall(r"\]\(#([\w-]+)\)", method.result)
    assert "<!-- results:" in anchors(TEXT)[anchor]


def test_a_broken_row_is_seen() -> None:
    (row,) = methods(
        "| " + " | ".join(COLUMNS) + " |\n|---|---|---|---|---|\n| a | `x=1` | `conf/a.yaml` | none | - |\n"
    )
    assert (row.overrides, row.configs, row.tests) == (["x=1"], ["conf/a.yaml"], [])
