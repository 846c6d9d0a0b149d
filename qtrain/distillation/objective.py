"""The objective: named terms, their weights, and their sum."""

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor, nn

from qtrain.distillation.base import Term
from qtrain.spec import StepOutputs


@final
class Objective(nn.Module):
    """``sum_i weight_i(progress) * balance_i * term_i(outputs)`` over named terms; one given as ``None`` is left out.

    Weights and balance are buffers, so that a change of their values does not recompile the graph. The balance is 1
    unless a callback sets it. That callback also saves it: the balance is not in the state dict, because a later fit
    with the same regressors has its own balance. Call :meth:`bind_` once the feature shapes are known, and
    :meth:`set_progress_` before each step.
    """

    weights: Tensor
    balance: Tensor

    def __init__(self, *, terms: Mapping[str, Term | None]) -> None:
        super().__init__()
        kept = {name: term for name, term in terms.items() if term is not None}
        if not kept:
            raise ValueError("Objective: no terms; name at least one, for instance objective=hard")
        self.terms = nn.ModuleDict(kept)
        self.register_buffer("weights", torch.zeros(len(kept)), persistent=False)
        self.register_buffer("balance", torch.ones(len(kept)), persistent=False)
        self.set_progress_(0.0)

    @property
    def _typed(self) -> list[tuple[str, Term]]:
        return [(name, term) for name, term in self.terms.items() if isinstance(term, Term)]

    @property
    def needs_teacher(self) -> bool:
        return bool(self.teacher_terms)

    @property
    def teacher_terms(self) -> list[str]:
        """Names of the terms that look at the teacher."""
        return [name for name, term in self._typed if term.needs_teacher]

    @property
    def compares_logits(self) -> bool:
        """Whether some term looks at the teacher's logits: one that looks at it and at none of its layers."""
        return any(term.needs_teacher and not term.teacher_taps for _, term in self._typed)

    @property
    def student_taps(self) -> list[str]:
        """Student layers that some term looks at, each once."""
        return list(dict.fromkeys(tap for _, term in self._typed for tap in term.student_taps))

    @property
    def teacher_taps(self) -> list[str]:
        """Teacher layers that some term looks at, each once."""
        return list(dict.fromkeys(tap for _, term in self._typed for tap in term.teacher_taps))

    def bind_(self, student: Mapping[str, tuple[int, ...]], teacher: Mapping[str, tuple[int, ...]]) -> None:
        """Let terms make their parameters; both map a layer's name to its output's shape for one image."""
        for _, term in self._typed:
            term.bind_(student, teacher)

    def set_progress_(self, progress: float) -> None:
        """Move all weights and temperatures to ``progress``, the share of optimizer steps done, without a host sync."""
        for i, (_, term) in enumerate(self._typed):
            self.weights[i].fill_(term.weight(progress))
            term.set_progress_(progress)

    def forward(self, outputs: StepOutputs) -> dict[str, Tensor]:
        """Losses by name, unweighted and 0-dim, and their weighted sum as ``total``."""
        losses = {name: term(outputs) for name, term in self._typed}
        total = (torch.stack(list(losses.values())) * self.weights * self.balance).sum()
        return {**losses, "total": total}
