"""FitNets hints: the student's middle learns to predict the teacher's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

import torch.nn.functional as F
from torch import Tensor, nn

from qtrain.distill.base import Term
from qtrain.functional.losses import hint_loss
from qtrain.schedules.base import Schedule
from qtrain.spec import StepOutputs


def fit_grid(x: Tensor, like: Tensor) -> Tensor:
    """``x`` (N, C, H, W) average-pooled to the grid of ``like`` where the two differ in height or width."""
    if x.ndim == 4 and like.ndim == 4 and x.shape[2:] != like.shape[2:]:
        return F.adaptive_avg_pool2d(x, (like.shape[2], like.shape[3]))
    return x


@final
class Hint(Term):
    """Squared error between a regressor on a student layer and a teacher layer, summed over pairs (arXiv 1412.6550).

    ``student_layers[i]`` is guided by ``teacher_layers[i]``: qualified names of modules, of any timm model. The
    regressor is a 1x1 convolution for maps (N, C, H, W), a linear layer for tokens (N, L, C) and vectors (N, C). It is
    trained with the student; no gradient reaches the teacher. A map of a larger grid is average-pooled to the smaller.
    """

    needs_teacher = True

    def __init__(
        self,
        *,
        student_layers: Sequence[str],
        teacher_layers: Sequence[str],
        weight: float | Schedule = 1.0,
    ) -> None:
        if len(student_layers) != len(teacher_layers) or not student_layers:
            raise ValueError(
                "Hint: student_layers and teacher_layers must be lists of equal length with at least one name, got "
                f"{list(student_layers)} and {list(teacher_layers)}"
            )
        super().__init__(weight=weight)
        self.student_taps, self.teacher_taps = tuple(student_layers), tuple(teacher_layers)
        self.regressors = nn.ModuleList()

    def bind_(self, student: Mapping[str, tuple[int, ...]], teacher: Mapping[str, tuple[int, ...]]) -> None:
        self.regressors = nn.ModuleList(
            _regressor(s, student[s], t, teacher[t]) for s, t in zip(self.student_taps, self.teacher_taps, strict=True)
        )

    def forward(self, outputs: StepOutputs) -> Tensor:
        total = outputs.logits.new_zeros((), dtype=outputs.logits.dtype).float()
        for regressor, s, t in zip(self.regressors, self.student_taps, self.teacher_taps, strict=True):
            guided, hint = outputs.features[s], outputs.teacher_features[t].detach()
            if guided.ndim == 4 and guided.shape[2:].numel() < hint.shape[2:].numel():
                hint = fit_grid(hint, guided)
            total = total + hint_loss(regressor(fit_grid(guided, hint)), hint)
        return total


def _regressor(student: str, s: tuple[int, ...], teacher: str, t: tuple[int, ...]) -> nn.Module:
    if len(s) != len(t) or len(s) not in (2, 3, 4) or (len(s) == 3 and s[1] != t[1]):
        raise ValueError(
            f"Hint: {student!r} gives {s} and {teacher!r} gives {t} for one image; both must be maps (N, C, H, W), "
            "vectors (N, C), or tokens (N, L, C) of one length"
        )
    if len(s) == 4:
        return nn.Conv2d(s[1], t[1], kernel_size=1, bias=False)
    return nn.Linear(s[-1], t[-1], bias=False)
