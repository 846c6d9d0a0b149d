"""Base of the terms that compare layers: pairs of a student's and a teacher's layer, by name."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor

from qtrain.distillation.base import Term
from qtrain.schedules.base import Schedule
from qtrain.spec import StepOutputs

FeatureShape = tuple[int, ...]
"""The shape of a layer's output for one image: maps (1, C, H, W), tokens (1, L, C), vectors (1, C)."""


def same_grid(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Maps (N, C, H, W) average-pooled to the smaller height and the smaller width of the two; others as they are."""
    if a.ndim != 4 or b.ndim != 4:
        return a, b
    grid = (min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3]))
    pooled_a, pooled_b = (x if x.shape[2:] == grid else F.adaptive_avg_pool2d(x, grid) for x in (a, b))
    return pooled_a, pooled_b


def same_places(a: FeatureShape, b: FeatureShape) -> bool:
    """Whether :func:`same_grid` makes the places of both agree: two maps, or tokens of one length."""
    return len(a) == len(b) and (len(a) == 4 or (len(a) == 3 and a[1] == b[1]))


class LayerTerm(Term):
    """A loss for each pair of layers, summed: ``sum_i compare(student_layers[i], teacher_layers[i])``.

    Names are qualified names of modules, of any timm model, each once; without ``teacher_layers`` the teacher's are
    those of the student. Gradient reaches the student and the term's own parameters, not the teacher.
    """

    needs_teacher = True
    rule: str
    """The condition that :meth:`comparable` checks, in words for the error message."""

    def __init__(
        self,
        *,
        student_layers: Sequence[str],
        teacher_layers: Sequence[str] | None = None,
        weight: float | Schedule = 1.0,
    ) -> None:
        owner = type(self).__name__
        teacher_layers = student_layers if teacher_layers is None else teacher_layers
        if len(student_layers) != len(teacher_layers) or not student_layers:
            raise ValueError(
                f"{owner}: student_layers and teacher_layers must be lists of equal length with at least one name, got "
                f"{list(student_layers)} and {list(teacher_layers)}"
            )
        super().__init__(weight=weight)
        self.student_taps, self.teacher_taps = tuple(student_layers), tuple(teacher_layers)

    @abstractmethod
    def comparable(self, student: FeatureShape, teacher: FeatureShape) -> bool:
        """Whether layers with outputs of these shapes can be compared."""

    @abstractmethod
    def compare(self, pair: int, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss between the outputs of the pair of that number, 0-dim."""

    def make_parameters_(self, shapes: Sequence[tuple[FeatureShape, FeatureShape]]) -> None:
        """Make what the term learns, if anything, from the shapes of each pair, which are comparable."""

    def bind_(self, student: Mapping[str, FeatureShape], teacher: Mapping[str, FeatureShape]) -> None:
        for s, t in zip(self.student_taps, self.teacher_taps, strict=True):
            if not self.comparable(student[s], teacher[t]):
                raise ValueError(
                    f"{type(self).__name__}: {s!r} gives {student[s]} and {t!r} gives {teacher[t]} for one image; "
                    f"{self.rule}"
                )
        pairs = zip(self.student_taps, self.teacher_taps, strict=True)
        self.make_parameters_([(student[s], teacher[t]) for s, t in pairs])

    def forward(self, outputs: StepOutputs) -> Tensor:
        pairs = enumerate(zip(self.student_taps, self.teacher_taps, strict=True))
        losses = [self.compare(i, outputs.features[s], outputs.teacher_features[t].detach()) for i, (s, t) in pairs]
        return sum(losses[1:], losses[0])
