"""Similarity-preserving distillation: images that are similar for the teacher are similar for the student."""

from typing import final

from torch import Tensor

from qtrain.distillation.layers import FeatureShape, LayerTerm
from qtrain.functional.losses import similarity_loss
from qtrain.functional.ranks import whole_batch


@final
class Similarity(LayerTerm):
    """Squared distance between images' similarities in a student and a teacher layer, summed over pairs.

    Layers of any shapes (Tung and Mori 2019, arXiv 1907.09682). The paper's weight, its gamma, is 3000, on the last
    convolutional layer.
    """

    rule = "each must have a row of features for each image"

    def comparable(self, student: FeatureShape, teacher: FeatureShape) -> bool:
        return min(len(student), len(teacher)) >= 2

    def compare(self, pair: int, student: Tensor, teacher: Tensor) -> Tensor:
        return similarity_loss(whole_batch(student), whole_batch(teacher))
