"""One training step's computation as a module, so that it compiles as one graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

from torch import Tensor, nn

from qtrain.distill.objective import Objective
from qtrain.models.taps import FeatureTaps
from qtrain.spec import StepOutputs

TEACHER = "teacher"
"""Prefix of the losses of a teacher that learns."""


@final
class LearningTeacher(nn.Module):
    """A teacher in full precision that is trained beside its student, by an objective of its own.

    In ``objective`` the roles are exchanged: the "student" is this teacher, the "teacher" is the student. So labels
    alone give joint training as Apprentice's scheme A (arXiv 1711.05852, §3.1), labels and softened outputs the
    co-studying of QKD (arXiv 1911.12491, §3.2) and mutual learning. Neither's gradient reaches the other.
    """

    def __init__(self, *, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective


@final
class StudentStep(nn.Module):
    """Student forward and objective: images and what the teacher said to named losses.

    Holds ``student``, ``objective`` and ``teacher`` registered; nothing else has parameters. A teacher that learns runs
    here, its losses beside the student's as ``teacher/<name>`` and within ``total``; a frozen one is asked outside, and
    its answer given. Under ``torch.compile(fullgraph=True)`` the whole is one graph.
    """

    def __init__(self, *, student: nn.Module, objective: Objective, teacher: LearningTeacher | None = None) -> None:
        super().__init__()
        self.student = student
        self.objective = objective
        self.teacher = teacher
        looked_at = teacher.objective.teacher_taps if teacher else []
        self.taps = FeatureTaps(student, list(dict.fromkeys([*objective.student_taps, *looked_at])))
        self.teacher_taps = None
        if teacher is not None:
            names = [*objective.teacher_taps, *teacher.objective.student_taps]
            self.teacher_taps = FeatureTaps(teacher.model, list(dict.fromkeys(names)))

    def forward(
        self,
        image: Tensor,
        target: Tensor,
        teacher_logits: Tensor | None = None,
        teacher_features: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Losses by name, and ``total``, all 0-dim, for ``image`` (N, C, H, W)."""
        logits, features = self.taps.forward_with_features(image)
        if self.teacher is None or self.teacher_taps is None:
            return self.objective(StepOutputs(logits, target, features, teacher_logits, teacher_features or {}))
        answer, shown = self.teacher_taps.forward_with_features(image)
        losses = self.objective(StepOutputs(logits, target, features, answer.detach(), _detached(shown)))
        taught = self.teacher.objective(StepOutputs(answer, target, shown, logits.detach(), _detached(features)))
        return {
            **losses,
            **{f"{TEACHER}/{name}": loss for name, loss in taught.items()},
            "total": losses["total"] + taught["total"],
        }


def _detached(features: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: feature.detach() for name, feature in features.items()}
