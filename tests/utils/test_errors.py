"""Errors of others, as one line of ours."""

from __future__ import annotations

import pytest

from qtrain.utils.errors import one_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("first\nsecond"), "first"),
        (ValueError("\n  \n  later\n"), "later"),
        (RuntimeError(), "RuntimeError"),
        (KeyError("bias"), "no 'bias'"),
        (ValueError("a\x1b[2Jb\tc"), "a?[2Jb?c"),
        (ValueError("x" * 500), "x" * 200),
    ],
)
def test_one_line_is_the_first_that_says_something(error: Exception, line: str) -> None:
    assert one_line(error) == line
