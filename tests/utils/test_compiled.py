"""A compiled function, and what becomes of it where it cannot be compiled."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from qtrain.quantizers.uniform.lsq import LSQ
from qtrain.spec import Observed, QuantSpec
from qtrain.utils.compat import compiling
from qtrain.utils.compiled import Compiled, compiler_options
from tests.helpers.graphs import kept_by_compiled


def doubled(x: Tensor) -> Tensor:
    return 2 * x


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception | None], list[int]]:
    """Puts a compiler in the place of torch's that fails, or works, at the first call; returns the calls it saw."""

    def put(error: Exception | None) -> list[int]:
        calls: list[int] = []

        def compile(function: Any, **options: Any) -> Any:
            assert {**options, "options": set(options["options"])} == {
                "fullgraph": True, "dynamic": False, "options": set(compiler_options()),
            }  # fmt: skip

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


class Residual(nn.Module):
    """Two residual blocks; with ``bits`` what a convolution reads is quantized."""

    def __init__(self, bits: int | None) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(5))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(5))
        self.quantize = nn.ModuleList(nn.Identity() if bits is None else lsq(bits) for _ in range(5))

    def branch(self, x: Tensor, i: int) -> Tensor:
        y: Tensor = self.norms[i](self.convs[i](self.quantize[i](x)))
        return y

    def forward(self, x: Tensor) -> Tensor:
        x = self.branch(x, 0).relu()
        for i in (1, 3):
            x = (x + self.branch(self.branch(x, i).relu(), i + 1)).relu()
        return x


def lsq(bits: int) -> nn.Module:
    quantizer = LSQ(spec=QuantSpec(bits=bits, signed=False))
    quantizer.calibrate_(Observed(torch.tensor(0.0), torch.tensor(2.0), torch.tensor(1.0)))
    return quantizer.train()


def features_kept(bits: int | None, way: AbstractContextManager[Any]) -> int:
    """Bytes of the features that the compiled network keeps for its backward, without its result and its input."""
    torch.manual_seed(0)
    images = torch.randn(2, 4, 16, 16)
    with way:
        _, *kept = kept_by_compiled(Residual(bits), images)
    return sum(one.nbytes for one in kept if one.shape == images.shape) - images.nbytes


def test_a_quantized_network_keeps_no_more_features_than_full_precision() -> None:
    """Values before a quantizer and its codes are both read by the backward, and one of them is enough."""
    full_precision = features_kept(None, nullcontext())
    assert features_kept(4, compiling()) <= full_precision
    assert features_kept(4, nullcontext()) > full_precision, "or the test sees nothing"


@pytest.mark.slow  # two compilations, of which the second finds the first on disk
def test_a_step_with_gradients_by_hand_is_found_on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    counters.clear()
    gradients = []
    for _ in range(2):
        torch._dynamo.reset()
        x = torch.linspace(-1.0, 3.0, 64, requires_grad=True)
        Compiled(lsq(4))(x).sum().backward()
        assert x.grad is not None
        gradients.append(x.grad)
    found = counters["aot_autograd"]
    assert (found["autograd_cache_miss"], found["autograd_cache_hit"], found["autograd_cache_bypass"]) == (1, 1, 0)
    assert torch.equal(*gradients)
