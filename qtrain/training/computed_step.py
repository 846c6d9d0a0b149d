"""How a training step is computed: compiled, or eager and with weights that are quantized once a step."""

from collections.abc import Callable, Set
from contextlib import AbstractContextManager, nullcontext
from typing import Any, final

from torch import Tensor, nn

from qtrain.nn.held_weights import HeldWeights
from qtrain.quantizers.base import Quantizer
from qtrain.utils.compiled import Compiled

Losses = Callable[..., dict[str, Tensor]]


@final
class ComputedStep:
    """``step``, which gives the losses of a ``student`` by name; one compiled graph with ``compile``.

    With ``or_eager`` a step that cannot be compiled is computed all the same. This is not a module, since its modules
    belong to others. Where the gradients of several batches are added up, an eager step quantizes the student's weights
    once for all of them. One that was to be compiled, which gains nothing from that, does not, also where it gave up.
    """

    def __init__(self, step: Losses, student: nn.Module, *, compile: bool = False, or_eager: bool = False) -> None:
        self._compiled = Compiled(step, or_eager=or_eager) if compile else None
        self._step: Losses = self._compiled or step
        self._held = None if compile else HeldWeights(student)

    def __call__(self, *arguments: Any) -> dict[str, Tensor]:
        """What ``step`` gives for ``arguments``."""
        return self._step(*arguments)

    def hold(self, *, last: bool) -> AbstractContextManager[None]:
        """Inside, a call computes one of several batches that share their quantized weights; ``last`` ends the step."""
        return nullcontext() if self._held is None else self._held.batch(last=last)

    @property
    def held(self) -> Set[Quantizer]:
        """The quantizers that run once within :meth:`hold`."""
        return frozenset() if self._held is None else self._held.quantizers

    @property
    def gave_up(self) -> bool:
        """Whether the step should have been compiled and is not; may be set."""
        return self._compiled is not None and self._compiled.gave_up

    @gave_up.setter
    def gave_up(self, gave_up: bool) -> None:
        if self._compiled is not None:
            self._compiled.gave_up = gave_up

    @property
    def compiles(self) -> bool:
        """Whether calls are compiled."""
        return self._compiled is not None and not self.gave_up
