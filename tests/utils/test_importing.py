"""Code is found by its path only where it was admitted, and only where it is defined."""

from __future__ import annotations

import functools
import importlib
import sys
from pathlib import Path

import pytest

from qtrain.quantizers.uniform.lsq import LSQ
from qtrain.spec import PerTensor
from qtrain.utils.importing import import_object, import_without, path_of


@pytest.mark.parametrize("admitted", ["qtrain", "qtrain.quantizers", "qtrain.quantizers.uniform.lsq.LSQ"])
def test_a_class_is_found_in_a_package_that_holds_it_and_by_its_own_name(admitted: str) -> None:
    assert import_object(path_of(LSQ), admitted=[admitted]) is LSQ


@pytest.mark.parametrize("admitted", ["qtrain.quant", "qtrain.quantizers.uniform.lsq.LS", "os", "", "qtrain.spec"])
def test_a_class_outside_of_what_is_admitted_is_refused(admitted: str) -> None:
    with pytest.raises(ValueError, match=r"LSQ is code of your own, which is not run unasked"):
        import_object(path_of(LSQ), admitted=[admitted])


def test_a_class_that_a_package_hands_on_from_inside_it_is_found_there_too() -> None:
    assert import_object("qtrain.spec.PerTensor", admitted=["qtrain.spec"]) is PerTensor


@pytest.mark.parametrize("alias", ["import_object", "dataclasses.dataclass", "partial", "Tensor"])
def test_what_an_admitted_module_imports_is_not_admitted_with_it(alias: str) -> None:
    with pytest.raises(ValueError, match=r"is defined elsewhere|cannot import"):
        import_object(f"qtrain.storage.description.{alias}", admitted=["qtrain.storage"])


def test_an_alias_is_admitted_by_its_whole_name() -> None:
    path = "qtrain.storage.description.partial"
    assert import_object(path, admitted=[path]) is functools.partial


@pytest.mark.parametrize("path", ["qtrain.spec", "qtrain.spec.FULL_PRECISION", "qtrain.spec.", "qtrain.nothing.at_all"])
def test_what_is_not_there_or_cannot_be_called_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match=r"cannot import|has no|must be a class or function"):
        import_object(path, admitted=["qtrain"])


class Outer:
    class Inner:
        pass

    @classmethod
    def build(cls) -> None:
        pass


@pytest.mark.parametrize("target", [Outer.Inner, Outer.build, lambda: None], ids=["inner", "method", "lambda"])
def test_what_is_not_at_the_top_of_a_module_has_no_path(target: object) -> None:
    with pytest.raises(ValueError, match=r"cannot be imported elsewhere; define it at the top of a module of its own"):
        path_of(target)
    assert path_of(target, importable=False).endswith(getattr(target, "__name__", ""))


EAGER = """\
try:
    import slow_package
except ImportError:
    slow_package = None
"""


def test_a_module_imported_without_a_package_takes_it_as_missing_and_others_find_it_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow_package.py").write_text("")
    (tmp_path / "eager_module.py").write_text(EAGER)
    monkeypatch.syspath_prepend(tmp_path)
    import_without("eager_module", "slow_package")
    assert sys.modules["eager_module"].slow_package is None and "slow_package" not in sys.modules
    assert importlib.import_module("slow_package").__name__ == "slow_package"
    del sys.modules["eager_module"]
    import_without("eager_module", "slow_package")  # which is there already
    assert sys.modules["eager_module"].slow_package is sys.modules["slow_package"]
