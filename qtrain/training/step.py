"""The computation of one training step as a module, so that it compiles as one graph."""

from collections.abc import Mapping
from typing import final

from torch import Tensor, nn

from qtrain.distillation.objective import Objective
from qtrain.models.taps import FeatureTaps
from qtrain.nn.many_bits import ManyBits, label
from qtrain.spec import StepOutputs

TEACHER = "teacher"
"""Prefix of the loss names of a teacher that learns."""


@final
class LearningTeacher(nn.Module):
    """A teacher in full precision that is trained together with its student, by its own objective.

    In ``objective`` the roles are exchanged: the "student" is this teacher, the "teacher" is the student. With labels
    alone this is joint training as in Apprentice's scheme A (arXiv 1711.05852, §3.1), with labels and softened outputs
    the co-studying of QKD (arXiv 1911.12491, §3.2) or mutual learning. No gradient goes from one to the other.
    """

    def __init__(self, *, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective


@final
class StudentStep(nn.Module):
    """Forward of the student and the objective: from images and the teacher's outputs to named losses.

    ``student``, ``objective`` and ``teacher`` are registered modules; nothing else has parameters. A teacher that
    learns runs here, and its losses are returned as ``teacher/<name>`` and added to ``total``. A frozen teacher runs
    outside, and its outputs are arguments. Under ``torch.compile(fullgraph=True)`` all of this is one graph.
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
            own: dict[str, Tensor] = self.objective(
                StepOutputs(logits, target, features, teacher_logits, teacher_features or {})
            )
            return own
        answer, shown = self.teacher_taps.forward_with_features(image)
        losses = self.objective(StepOutputs(logits, target, features, answer.detach(), _detached(shown)))
        taught = self.teacher.objective(StepOutputs(answer, target, shown, logits.detach(), _detached(features)))
        return {
            **losses,
            **{f"{TEACHER}/{name}": loss for name, loss in taught.items()},
            "total": losses["total"] + taught["total"],
        }


@final
class ManyBitsStep(nn.Module):
    """Forward of all widths of a student of many bits, the widest first, which then teaches the others in place.

    The widest student is trained by ``objective``, and each other by ``narrow`` with the widest's detached outputs as
    the teacher's (Yu et al. 2019, arXiv 1911.07346, §3.3). Its losses are returned as ``w4/<name>``, and ``total`` is
    the sum over all widths. So one backward trains the shared weights for all of them.
    """

    def __init__(self, *, student: ManyBits, objective: Objective, narrow: Objective) -> None:
        super().__init__()
        self.student, self.objective, self.narrow = student, objective, narrow
        widest, *others = student.students.items()
        looked_at = dict.fromkeys([*objective.student_taps, *narrow.teacher_taps])
        self.widest = FeatureTaps(widest[1], list(looked_at))
        self.others = {label(bits): FeatureTaps(one, narrow.student_taps) for bits, one in others}

    def forward(
        self,
        image: Tensor,
        target: Tensor,
        teacher_logits: Tensor | None = None,
        teacher_features: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Losses by name, and ``total``, all 0-dim, for ``image`` (N, C, H, W)."""
        answer, shown = self.widest.forward_with_features(image)
        losses = dict(self.objective(StepOutputs(answer, target, shown, teacher_logits, teacher_features or {})))
        answer, shown = answer.detach(), _detached(shown)
        for name, taps in self.others.items():
            logits, features = taps.forward_with_features(image)
            own = self.narrow(StepOutputs(logits, target, features, answer, shown))
            losses |= {f"{name}/{term}": loss for term, loss in own.items() if term != "total"}
            losses["total"] = losses["total"] + own["total"]
        return losses


def _detached(features: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: feature.detach() for name, feature in features.items()}
