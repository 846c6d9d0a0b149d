"""What ``import qtrain`` offers: few names, each with an example that runs, and nothing heavy before it is used."""

from __future__ import annotations

import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import qtrain

FUNCTIONS = [name for name in qtrain.__all__ if callable(getattr(qtrain, name)) and name[0].islower()]


def test_few_names_are_offered() -> None:
    assert len({*qtrain.__all__} - {"__version__"}) <= 14
    assert set(qtrain.__all__) <= set(dir(qtrain))


def test_no_name_is_a_room_of_the_package() -> None:
    """A package that is imported takes the name of its folder, and hides a function of that name."""
    rooms = {path.stem for path in Path(qtrain.__file__).parent.iterdir() if not path.name.startswith("_")}
    assert rooms.isdisjoint(qtrain.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'qtrain' has no attribute 'quantise'"):
        qtrain.quantise  # type: ignore[attr-defined] # noqa: B018


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_function_has_an_example(name: str) -> None:
    doc = getattr(qtrain, name).__doc__
    assert doc is not None
    assert ">>>" in doc or "begin_step_" in doc, "project_ refers to the loop that begin_step_ shows"


@pytest.mark.parametrize("module", sorted({getattr(qtrain, name).__module__ for name in FUNCTIONS}))
def test_examples_print_what_they_say(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted > 0
    assert result.failed == 0


def test_importing_loads_no_torch_and_no_config() -> None:
    heavy = "{'torch', 'timm', 'hydra', 'pytorch_lightning', 'numpy'}"
    code = f"import sys, qtrain; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_exporting_without_its_packages_names_the_extra() -> None:
    code = "import sys; sys.modules['onnx'] = sys.modules['onnx_ir'] = None; import qtrain; qtrain.export"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    said = done.stderr.splitlines()[-1]
    assert re.fullmatch(r"ImportError: qtrain.export: onnx\w* is not installed; pip install 'qtrain\[export\]'", said)
