"""Block-wise matching: each block of the student gives what the teacher's block gives."""

from typing import final

from torch import Tensor

from qtrain.distillation.layers import FeatureShape, LayerTerm
from qtrain.functional.losses import relative_squared_error


@final
class Blockwise(LayerTerm):
    """Relative squared error between the outputs of layer pairs of one shape, summed over pairs.

    For a teacher of the student's own architecture, above all the student before quantization: no regressor stands
    between them, so a block learns to compute the same function in fewer bits. Only the error's unit is taken out; see
    :func:`relative_squared_error`.
    """

    rule = "both must have one shape; objective=hint compares layers of other shapes, through a regressor"

    def comparable(self, student: FeatureShape, teacher: FeatureShape) -> bool:
        return student == teacher

    def compare(self, pair: int, student: Tensor, teacher: Tensor) -> Tensor:
        return relative_squared_error(student, teacher)
