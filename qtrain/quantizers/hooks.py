"""What a quantizer may ask of training beyond its forward; the training module looks for these methods.

A rate that follows a schedule, a draw of random numbers, a projection of the weights after each step: a quantizer that
needs one of them has the method, and nothing else has to know.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from qtrain.functional.random import seed_of


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
