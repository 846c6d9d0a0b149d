"""Relational distillation: distances and angles between a batch's images are as the teacher sees them."""

from collections.abc import Sequence
from typing import final

from torch import Tensor

from qtrain.distillation.layers import FeatureShape, LayerTerm
from qtrain.functional.losses import relational_angle_loss, relational_distance_loss
from qtrain.functional.ranks import whole_batch
from qtrain.schedules.base import Schedule


def embedding(x: Tensor) -> Tensor:
    """A vector for each image: maps (N, C, H, W) and tokens (N, L, C) averaged over their places, (N, C)."""
    return x.mean(dim=(2, 3)) if x.ndim == 4 else x.mean(dim=1) if x.ndim == 3 else x


@final
class Relational(LayerTerm):
    """``distance * RKD-D + angle * RKD-A`` of the embeddings of layer pairs, summed over pairs (arXiv 1904.05068).

    The embedding is the layer's output averaged over its places, so that the last layer before the head's pooling is
    the paper's choice; it weighs angles twice as much as distances. Layers of any shapes. For a batch of N, distances
    take N^2 C numbers of memory, angles N^3 more; ``angle=0`` leaves these out.
    """

    rule = "each must be a map (N, C, H, W), tokens (N, L, C) or vectors (N, C)"

    def __init__(
        self,
        *,
        student_layers: Sequence[str],
        teacher_layers: Sequence[str] | None = None,
        weight: float | Schedule = 1.0,
        distance: float = 1.0,
        angle: float = 2.0,
    ) -> None:
        if min(distance, angle) < 0 or distance + angle == 0:
            raise ValueError(
                f"Relational: distance and angle must be at least 0 and not both 0, got {distance} and {angle}"
            )
        super().__init__(student_layers=student_layers, teacher_layers=teacher_layers, weight=weight)
        self.distance, self.angle = distance, angle

    def comparable(self, student: FeatureShape, teacher: FeatureShape) -> bool:
        return {len(student), len(teacher)} <= {2, 3, 4}

    def compare(self, pair: int, student: Tensor, teacher: Tensor) -> Tensor:
        mine, theirs = whole_batch(embedding(student)), whole_batch(embedding(teacher))
        losses = []
        if self.distance:
            losses.append(self.distance * relational_distance_loss(mine, theirs))
        if self.angle:
            losses.append(self.angle * relational_angle_loss(mine, theirs))
        return sum(losses[1:], losses[0])
