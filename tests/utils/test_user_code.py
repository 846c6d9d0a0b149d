"""Importing code of the user's: from the current folder too, and with what is wrong in it as one line."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from qtrain.utils.user_code import BuilderPath, explained, import_builder, parameters_of, takes_any


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("import nothing_such\n", r"ModuleNotFoundError: No module named 'nothing_such' \(usermodule\.py, line 1\)"),
        ("\n\nx = 1 / 0\n", r"ZeroDivisionError: division by zero \(usermodule\.py, line 3\)"),
        ("def f(:\n", r"SyntaxError: .*\(usermodule\.py, line 1\)"),
    ],
)
def test_a_module_that_fails_is_named_with_the_line(
    text: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "usermodule.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=f"cannot import usermodule: {line}; HYDRA_FULL_ERROR=1") as error:
        import_builder(BuilderPath("usermodule.f"))
    assert "\n" not in str(error.value)


def test_a_path_without_a_module_is_refused() -> None:
    with pytest.raises(ValueError, match="'build' must be a dotted path"):
        import_builder(BuilderPath("build"))


def test_the_current_folder_is_searched_by_a_console_script_unless_python_is_told_not_to(tmp_path: Path) -> None:
    (tmp_path / "here.py").write_text("def build(): return 1\n")
    script = tmp_path / "bin" / "script.py"
    script.parent.mkdir()
    script.write_text(
        "import sys\nfrom qtrain.utils.user_code import import_builder\n"
        "sys.path = [p for p in sys.path if p not in ('', sys.argv[1])]\nprint(import_builder('here.build')())\n"
    )
    command = [sys.executable, str(script), str(tmp_path)]
    repo = Path(__file__).resolve().parents[2]

    def run(**more: str) -> str:
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(repo), **more}
        )
        return done.stdout + done.stderr.strip().rpartition("\n")[2]

    assert run() == "1\n"
    assert "there is no module 'here'" in run(PYTHONSAFEPATH="1")


def test_parameters_that_can_be_named() -> None:
    def make(first: int, /, second: int, *rest: int, third: int = 0, **others: int) -> None: ...

    assert list(parameters_of(make)) == ["second", "third"] and takes_any(make)
    assert list(parameters_of(partial(make, third=1))) == ["second", "third"]
    assert not takes_any(lambda: None)
    assert not parameters_of(dict) and takes_any(dict), "a built-in whose signature is not known"


def test_an_error_is_explained_by_the_users_last_line() -> None:
    try:
        int("x")
    except ValueError as error:
        assert explained(error).startswith("ValueError: invalid literal for int() with base 10: 'x' (test_user_code.py")
