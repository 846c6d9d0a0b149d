"""Attention transfer: the student is active where the teacher is."""

from typing import final

from torch import Tensor

from qtrain.distillation.layers import FeatureShape, LayerTerm, same_grid, same_places
from qtrain.functional.losses import attention_loss


@final
class Attention(LayerTerm):
    """Squared distance between normalized activation maps of layer pairs, summed over pairs (arXiv 1612.03928).

    Layers may differ in channels and, of maps, in size: the larger grid is average-pooled to the smaller. The paper's
    weight (its beta) is 1000, on the ends of all groups of a ResNet.
    """

    rule = "both must be maps (N, C, H, W), or tokens (N, L, C) of one length; vectors have no places to attend to"

    def comparable(self, student: FeatureShape, teacher: FeatureShape) -> bool:
        return same_places(student, teacher)

    def compare(self, pair: int, student: Tensor, teacher: Tensor) -> Tensor:
        return attention_loss(*same_grid(student, teacher))
