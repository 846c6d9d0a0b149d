"""What a quantizer may ask of training beyond its forward; the training module looks for these methods.

Examples are a rate that follows a schedule, a draw of random numbers, a projection of the weights after each step, and
a range that a change of bits carries over. A quantizer that needs one of them has the method; no other code has to
know.
"""

from collections import Counter
from collections.abc import Callable, Set
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
        belongs in buffers, so that a change does not recompile the graph.
        """


@runtime_checkable
class Penalizing(Protocol):
    """A quantizer whose forward adds a penalty to the loss; see :func:`qtrain.functional.ste.with_penalty`."""

    penalty_share: float
    """What the penalty is multiplied by, so that the batches of one optimizer step add it once: 1 for a single one."""


@runtime_checkable
class Projection(Protocol):
    """A weight quantizer that moves the weight itself after each optimizer step."""

    def project(self, weight: Tensor) -> Tensor:
        """The weight (O, I, ...) to go on with, of the same shape; a function of its argument and the state."""


@runtime_checkable
class Partition(Protocol):
    """A weight quantizer that freezes a part of the weights before some of the optimizer steps."""

    @property
    def due(self) -> bool:
        """Whether :meth:`partition_` has something to do; known without looking at a tensor."""

    def partition_(self, weight: Tensor) -> Tensor:
        """The weight (O, I, ...) to go on with, of the same shape; the state remembers which part of it is frozen."""


@runtime_checkable
class Rescalable(Protocol):
    """A quantizer with a range of its own, which can be made wider and narrower."""

    def rescale_(self, factor: Tensor) -> dict[nn.Parameter, Tensor]:
        """Multiply every value that a code stands for by ``factor``, of the state shape and above 0, in place.

        Returns, for each parameter that this changed, what its gradient is multiplied by: for a parameter ``p`` that
        the values are proportional to, ``1 / factor``, since ``dL/d(f p) = (1/f) dL/dp``. A quantizer that has only
        some ranges takes the nearest; an offset stays.
        """


@runtime_checkable
class EvenSteps(Protocol):
    """A quantizer whose values are whole numbers times a step: ``round(clamp(x / step, code_low, code_high)) step``."""

    def step(self) -> Tensor:
        """The step in use, of the state shape, above 0."""


def has_method(thing: object, name: str) -> bool:
    """Whether the class of ``thing`` has the method. For checks of every module at every step, where a protocol is
    slow."""
    return hasattr(type(thing), name)


def begin_step_(model: nn.Module, *, seed: int, step: int, progress: float) -> None:
    """Tell every step-aware quantizer of ``model`` that optimizer step ``step`` begins.

    Random numbers are a function of (seed, step, place in the model), so a resumed run draws what it would have drawn.
    """
    for place, module in enumerate(model.modules()):
        if has_method(module, "begin_step_"):
            assert isinstance(module, StepAware)
            module.begin_step_(progress=progress, key=seed_of(seed, step, place))


def share_penalties_(model: nn.Module, share: float, *, once: Set[nn.Module] = frozenset()) -> None:
    """Tell every penalizing quantizer of ``model`` the ``share`` of a step that one call of it is.

    That is the share of a batch, divided among the layers that have the quantizer together. Those within ``once`` are
    called once a step, whatever number of batches it has.
    """
    called_once = {inner for quantizer in once for inner in quantizer.modules()}
    owners = Counter(
        quantizer
        for layer in model.modules()
        for name in ("weight_quantizer", "input_quantizer", "tensor_quantizer")
        if (held := getattr(layer, name, None)) is not None
        for quantizer in held.modules()
    )
    for module in model.modules():
        if isinstance(module, Penalizing):
            module.penalty_share = (1.0 if module in called_once else share) / max(1, owners[module])


def project(quantizer: nn.Module, weight: Tensor) -> Tensor:
    """``weight`` as ``quantizer`` projects it, or unchanged if that is not a ``Projection``; for wrappers."""
    return quantizer.project(weight) if isinstance(quantizer, Projection) else weight


@runtime_checkable
class ScalesOutput(Protocol):
    """An input quantizer whose values lack a factor that only the layer's output can take, as XNOR-Net's map K."""

    def output_factor(self, x: Tensor, layer: nn.Module) -> Tensor:
        """The factor of ``layer``'s output before the bias, against which it broadcasts; ``x`` is the layer's input."""
