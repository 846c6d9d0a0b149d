"""A compiled function, and what becomes of it where it cannot be compiled."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qtrain.utils.compiled import Compiled


def doubled(x: Tensor) -> Tensor:
    return 2 * x


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception | None], list[int]]:
    """Puts a compiler in the place of torch's that fails, or works, at the first call; returns the calls it saw."""

    def put(error: Exception | None) -> list[int]:
        calls: list[int] = []

        def compile(function: Any, **options: Any) -> Any:
            assert options == {"fullgraph": True, "dynamic": False}

            def compiled(x: Tensor) -> Tensor:
                calls.append(len(calls))
                if error is not None:
                    raise error
                result: Tensor = function(x)
                return result

            return compiled

        monkeypatch.setattr(torch, "compile", compile)
        return calls

    return put


def test_what_cannot_be_compiled_runs_as_it_was_and_says_so_once(
    compiler: Callable[[Exception | None], list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    calls = compiler(RuntimeError("no compiler\nwith much to read"))
    step = Compiled(doubled, or_eager=True)
    with caplog.at_level(logging.WARNING):
        assert [step(torch.tensor(float(i))).item() for i in range(3)] == [0.0, 2.0, 4.0]
    assert (len(calls), step.gave_up) == (1, True)
    (line,) = caplog.messages
    assert "compiling it failed (RuntimeError: no compiler)" in line


def test_without_leave_to_fall_back_the_error_is_raised(compiler: Callable[[Exception | None], list[int]]) -> None:
    compiler(RuntimeError("no compiler"))
    with pytest.raises(RuntimeError, match="no compiler"):
        Compiled(doubled)(torch.ones(1))


def test_an_error_of_the_function_itself_is_its_own(compiler: Callable[[Exception | None], list[int]]) -> None:
    def wrong(x: Tensor) -> Tensor:
        raise ValueError("of the function")

    compiler(RuntimeError("no compiler"))
    with pytest.raises(ValueError, match="of the function"):
        Compiled(wrong, or_eager=True)(torch.ones(1))


def test_after_the_first_call_every_error_is_raised(compiler: Callable[[Exception | None], list[int]]) -> None:
    def positive(x: Tensor) -> Tensor:
        if x.item() < 0:
            raise ValueError("below 0")
        return x

    calls = compiler(None)
    step = Compiled(positive, or_eager=True)
    step(torch.ones(1))
    with pytest.raises(ValueError, match="below 0"):
        step(-torch.ones(1))
    assert (len(calls), step.gave_up) == (2, False)


def test_a_graph_that_torch_cannot_make_is_a_failure_too() -> None:
    def breaks(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return 2 * x

    step = Compiled(breaks, or_eager=True)
    assert step(torch.ones(1)).item() == 2.0
    assert step.gave_up
