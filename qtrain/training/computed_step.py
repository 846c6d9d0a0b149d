"""How a training step is computed: eager or compiled, and with weights that are quantized once a step."""

from collections.abc import Callable, Set
from contextlib import AbstractContextManager, nullcontext
from typing import Any, final

from torch import Tensor, nn

from qtrain.nn.held_weights import HeldWeights, QuantizedWeights
from qtrain.quantizers.base import Quantizer
from qtrain.utils.compiled import Compiled

Losses = Callable[..., dict[str, Tensor]]


@final
class ComputedStep:
    """``step``, which gives the losses of a ``student`` by name; one compiled graph with ``compile``.

    With ``or_eager`` a step that cannot be compiled is computed all the same. This is not a module, since its modules
    belong to others. Where the gradients of several batches are added up, :meth:`batch` quantizes the student's weights
    once for all of them; compiled, they are a second graph, and either both are compiled or none.
    """

    def __init__(self, step: Losses, student: nn.Module, *, compile: bool = False, or_eager: bool = False) -> None:
        weights = QuantizedWeights(student)
        self._step: Losses = step
        quantize: Callable[[], list[Tensor]] = weights
        self._compiled: tuple[Compiled[..., Any], ...] = ()
        if compile:
            self._step, quantize = Compiled(step, or_eager=or_eager), Compiled(weights, or_eager=or_eager)
            self._compiled = self._step, quantize
        self._held = HeldWeights(weights, quantize)
        self.quantizers: Set[Quantizer] = weights.quantizers
        """Quantizers of the weights that :meth:`batch` quantizes once."""

    def __call__(self, *arguments: Any) -> dict[str, Tensor]:
        """What ``step`` gives for ``arguments``."""
        losses = self._step(*arguments)
        self.gave_up = self.gave_up
        return losses

    def batch(self, *, last: bool, hold: bool) -> AbstractContextManager[None]:
        """Inside, a call computes one batch of a step, ``last`` or not; with ``hold`` its weights serve all of them."""
        return self._held.batch(last=last) if hold else nullcontext()

    @property
    def gave_up(self) -> bool:
        """Whether the step should have been compiled and is not; may be set."""
        return any(part.gave_up for part in self._compiled)

    @gave_up.setter
    def gave_up(self, gave_up: bool) -> None:
        for part in self._compiled:
            part.gave_up = gave_up

    @property
    def compiles(self) -> bool:
        """Whether calls are compiled."""
        return bool(self._compiled) and not self.gave_up
