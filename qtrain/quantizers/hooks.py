"""What a quantizer may ask of training beyond its forward; the training module looks for these methods.

A rate that follows a schedule, a draw of random numbers, a projection of the weights after each step: a quantizer that
needs one of them has the method, and nothing else has to know.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from qtrain.functional.random import seed_of

Rate = float | Callable[[float], float]
"""A number, or a schedule: the number as a function of progress, the share of steps done, 0 to 1."""


def rate_at(rate: Rate, progress: float) -> float:
    """``rate`` at ``progress``."""
    return float(rate(progress)) if callable(rate) else float(rate)


def checked_share(owner: str, name: str, rate: Rate) -> Rate:
    """``rate`` if it is a schedule or a number in [0, 1]; otherwise an error that says whose it is."""
    if not callable(rate) and not 0 <= rate <= 1:
        raise ValueError(f"{owner}: {name} must be in [0, 1], got {rate}; or give a schedule with such values")
    return rate


@runtime_checkable
class StepAware(Protocol):
    """A quantizer whose forward in training depends on the step."""

    def begin_step_(self, *, progress: float, key: int) -> None:
        """Called before each training step with the share of steps done, 0 to 1, and a number for its random draws.

        ``key`` (63 bits) differs from step to step and from quantizer to quantizer and is the same on all ranks. State
        belongs in buffers, so that a change is no recompilation.
        """


@runtime_checkable
class Projection(Protocol):
    """A weight quantizer that moves the weight itself after each optimizer step."""

    def project(self, weight: Tensor) -> Tensor:
        """The weight (O, I, ...) to go on with, of the same shape; a function of its argument and the state."""


def begin_step_(model: nn.Module, *, seed: int, step: int, progress: float) -> None:
    """Tell every step-aware quantizer of ``model`` that optimizer step ``step`` begins.

    Random numbers are a function of (seed, step, place in the model), so a resumed run draws what it would have drawn.
    """
    for place, module in enumerate(model.modules()):
        if isinstance(module, StepAware):
            module.begin_step_(progress=progress, key=seed_of(seed, step, place))


def project(quantizer: nn.Module, weight: Tensor) -> Tensor:
    """``weight`` as ``quantizer`` projects it, or itself where that is no ``Projection``; so wrappers hand it on."""
    return quantizer.project(weight) if isinstance(quantizer, Projection) else weight


@runtime_checkable
class ScalesOutput(Protocol):
    """An input quantizer whose values lack a factor that only the layer's output can take, as XNOR-Net's map K."""

    def output_factor(self, x: Tensor, layer: nn.Module) -> Tensor:
        """The factor of ``layer``'s output before the bias, against which it broadcasts; ``x`` is the layer's input."""
