"""FitNets hints: the student's middle learns to predict the teacher's."""

from collections.abc import Sequence
from typing import final

from torch import Tensor, nn

from qtrain.distillation.layers import FeatureShape, LayerTerm, same_grid, same_places
from qtrain.functional.losses import hint_loss
from qtrain.schedules.base import Schedule


@final
class Hint(LayerTerm):
    """Squared error between a regressor on a student layer and a teacher layer, summed over pairs (arXiv 1412.6550).

    The regressor is a 1x1 convolution for maps (N, C, H, W), a linear layer for tokens (N, L, C) and vectors (N, C).
    It is trained with the student. A map of a larger grid is average-pooled to the smaller.
    """

    rule = "both must be maps (N, C, H, W), vectors (N, C), or tokens (N, L, C) of one length"

    def __init__(
        self,
        *,
        student_layers: Sequence[str],
        teacher_layers: Sequence[str] | None = None,
        weight: float | Schedule = 1.0,
    ) -> None:
        super().__init__(student_layers=student_layers, teacher_layers=teacher_layers, weight=weight)
        self.regressors = nn.ModuleList()

    def comparable(self, student: FeatureShape, teacher: FeatureShape) -> bool:
        return same_places(student, teacher) or len(student) == len(teacher) == 2

    def make_parameters_(self, shapes: Sequence[tuple[FeatureShape, FeatureShape]]) -> None:
        self.regressors = nn.ModuleList(_regressor(student, teacher) for student, teacher in shapes)

    def compare(self, pair: int, student: Tensor, teacher: Tensor) -> Tensor:
        guided, hint = same_grid(student, teacher)
        return hint_loss(self.regressors[pair](guided), hint)


def _regressor(student: FeatureShape, teacher: FeatureShape) -> nn.Module:
    if len(student) == 4:
        return nn.Conv2d(student[1], teacher[1], kernel_size=1, bias=False)
    return nn.Linear(student[-1], teacher[-1], bias=False)
