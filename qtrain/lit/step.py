"""One training step's computation as a module, so that it compiles as one graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

from torch import Tensor, nn

from qtrain.distill.objective import Objective
from qtrain.models.taps import FeatureTaps
from qtrain.spec import StepOutputs


@final
class StudentStep(nn.Module):
    """Student forward and objective: images and what the teacher said to named losses.

    Holds ``student`` and ``objective`` registered; nothing else has parameters. Under
    ``torch.compile(fullgraph=True)`` the whole is one graph.
    """

    def __init__(self, *, student: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.student = student
        self.objective = objective
        self.taps = FeatureTaps(student, objective.student_taps)

    def forward(
        self,
        image: Tensor,
        target: Tensor,
        teacher_logits: Tensor | None = None,
        teacher_features: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Losses by name, and ``total``, all 0-dim, for ``image`` (N, C, H, W)."""
        logits, features = self.taps.forward_with_features(image)
        return self.objective(StepOutputs(logits, target, features, teacher_logits, teacher_features or {}))
