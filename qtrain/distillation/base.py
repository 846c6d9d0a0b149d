"""The interface of the objective's terms: named losses with a weight that may follow a schedule."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor, nn

from qtrain.schedules.base import Schedule
from qtrain.schedules.constant import Constant
from qtrain.spec import StepOutputs


def as_schedule(value: float | Schedule) -> Schedule:
    """``value`` as a schedule; a plain number becomes a constant one."""
    return value if isinstance(value, Schedule) else Constant(value=float(value))


class Term(nn.Module, ABC):
    """Base of all terms. A term is a pure function of one step's outputs; its few parameters are its own.

    ``student_taps`` and ``teacher_taps`` name the layers whose outputs it compares; ``needs_teacher`` says whether it
    needs a teacher at all.
    """

    needs_teacher: bool = False
    student_taps: tuple[str, ...] = ()
    teacher_taps: tuple[str, ...] = ()

    def __init__(self, *, weight: float | Schedule = 1.0) -> None:
        super().__init__()
        self.weight = as_schedule(weight)

    @abstractmethod
    def forward(self, outputs: StepOutputs) -> Tensor:
        """The term's loss, 0-dim, before its weight."""

    def bind_(self, student: Mapping[str, tuple[int, ...]], teacher: Mapping[str, tuple[int, ...]]) -> None:
        """Make the parameters that depend on feature shapes: layer name -> shape of its output for one image.

        Called once, before an optimizer, a strategy or a checkpoint sees the objective.
        """

    def set_progress_(self, progress: float) -> None:
        """Move tensors that follow a schedule of their own (a temperature) to ``progress``, in place."""
