"""Bits that are learned by gradient: each tensor is a mixture of all its widths (EdMIPS, arXiv 2004.05795)."""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar, final

import numpy as np
import torch
from scipy.special import softmax
from torch import Tensor, nn

from qtrain.allocate.base import Search
from qtrain.allocate.expected_budget import prices_of_budgets
from qtrain.allocate.integer_program import IntegerProgram
from qtrain.allocate.problem import Floats, Group, Problem
from qtrain.convert.bank import ROLES, QuantizerBank
from qtrain.functional.losses import hard_loss
from qtrain.quantizers.base import Quantizer
from qtrain.spec import FULL_PRECISION, Allocation, Batch, Role, Scores
from qtrain.utils.checks import check_range
from qtrain.utils.eval_mode import evaluating

MEMORY = 0.9
"""How much of the gradients' mean square stays from one step to the next."""


@final
@dataclass(frozen=True, kw_only=True)
class Learned(Search):
    """Weights and inputs are ``sum_b p_b Q_b(x)``, and the strengths that the shares ``p`` follow from are trained.

    The options of a layer share ``p_o ~ exp(strength_w(o) + strength_a(o) - sum_m price_m cost_mo)``. EdMIPS adds the
    cost to the loss, at one price for all the training. Here each step finds the least prices at which the expected
    costs meet the budgets. So none has to be tuned, and each layer trains beside others of as few bits as they will
    have. Strengths move against the gradient by the shares (exponentiated gradient). Its unit is the root mean square
    over all layers, so that a layer that matters more gains more.

    ``steps`` steps run over the calibration batches in turn: strengths learn at ``lr``, the network's weights and the
    quantizers' scales by Adam at ``weight_lr``; 0 leaves them. The answer is the strongest allocation within the
    budgets. The network itself is not changed.
    """

    needs_scores: ClassVar[bool] = False

    steps: int = 200
    lr: float = 0.05
    weight_lr: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("Learned", "[1, inf)", steps=self.steps)
        check_range("Learned", "[0, inf)", lr=self.lr, weight_lr=self.weight_lr)

    def search(self, problem: Problem) -> Allocation:
        """The strongest bits after training.

        Raises ``ValueError`` for a problem without a model and images with labels, and for a loss that is not finite.
        """
        if problem.bank is None or not problem.batches:
            raise ValueError("Learned: needs a model and images; this problem has none")
        batches = [batch for batch in problem.batches if batch.labeled]
        if not batches:
            raise ValueError("Learned: needs labels, and data.labeled hides those of all images here")
        mixed = _Mixed(copy.deepcopy(problem.bank), problem.groups())
        with torch.enable_grad():
            self._train(mixed, batches, problem.room())
        asked = Problem(
            options=problem.options, costs=problem.costs, budgets=problem.budgets,
            scores=mixed.scores(), ties=problem.ties,
        )  # fmt: skip
        return IntegerProgram().search(asked)

    def _train(self, mixed: "_Mixed", batches: Sequence[Batch], room: Floats) -> None:
        optimizer = torch.optim.Adam(mixed.own_parameters(), lr=self.weight_lr)
        square = 0.0
        for step in range(self.steps):
            batch = batches[step % len(batches)]
            mixed.mix_(room)
            optimizer.zero_grad(set_to_none=True)
            with evaluating(mixed.bank.model):  # statistics of batch norm belong to the trained network
                loss = hard_loss(mixed.bank.model(batch.image), batch.target)
            loss.backward()
            optimizer.step()
            slopes = [part.slope() for part in mixed.parts]
            mean = float(np.mean(np.concatenate(slopes) ** 2))
            if not (math.isfinite(loss.item()) and math.isfinite(mean)):
                what = f"the loss or its gradient is not finite at step {step}"
                raise ValueError(f"Learned: {what}; allow more bits, or lower weight_lr")
            square = MEMORY * square + (1 - MEMORY) * mean
            unit = (square / (1 - MEMORY ** (step + 1))) ** 0.5
            for part, slope in zip(mixed.parts, slopes, strict=True):
                part.strengths -= self.lr * slope / max(unit, np.finfo(float).tiny)


class _Mixture(nn.Module):
    """``sum_b p_b Q_b(x)``: a tensor at all its widths at once; full precision is the tensor itself."""

    def __init__(self, quantizers: Sequence[Quantizer | None]) -> None:
        super().__init__()
        self.quantizers = nn.ModuleList([nn.Identity() if one is None else one for one in quantizers])
        self.shares = torch.zeros(len(quantizers))
        """(B,); their gradient is asked for."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([share * one(x) for share, one in zip(self.shares, self.quantizers, strict=True)]).sum(0)


@dataclass
class _Part:
    """The weights or the inputs of a group of layers: B widths, which of them each option has, and how strong they are.

    ``widths`` (B,) rise, ``of_option`` (O,) are places in it, ``strengths`` (B,) are learned. Where there is one width
    alone there are no ``mixtures``.
    """

    layer: str
    role: Role
    widths: list[int]
    of_option: list[int]
    strengths: Floats
    mixtures: list[_Mixture]

    def mix_(self, shares: Floats) -> None:
        """Let the mixtures follow the options' ``shares`` (O,)."""
        own = np.bincount(self.of_option, shares, len(self.widths))
        for mixture in self.mixtures:
            device = mixture.shares.device
            mixture.shares = torch.tensor(own, dtype=torch.float32, device=device, requires_grad=True)

    def slope(self) -> Floats:
        """How the loss rises with each width's share, (B,), beside the mean over the widths."""
        total: Floats = np.zeros(len(self.widths))
        for mixture in self.mixtures:
            if mixture.shares.grad is not None:  # a layer that did not run has none
                total += mixture.shares.grad.double().cpu().numpy()
        total -= total.mean()
        return total


class _Mixed:
    """The model of a bank in which every group of layers has mixtures, with common strengths for each role."""

    def __init__(self, bank: QuantizerBank, groups: Sequence[Group]) -> None:
        self.bank, self.groups = bank, groups
        bank.use_({layer: group.options[0] for group in groups for layer in group.layers})
        self._parts = [[self._part(group, role) for role in ROLES] for group in groups]

    @property
    def parts(self) -> list[_Part]:
        """Of all groups in a row."""
        return list(chain.from_iterable(self._parts))

    def own_parameters(self) -> Iterator[nn.Parameter]:
        """Weights of the network and scales of the quantizers."""
        return (one for one in self.bank.model.parameters() if one.requires_grad)

    def mix_(self, room: Floats) -> None:
        """Let all mixtures follow the strengths, as far as ``room`` (M,) allows."""
        strengths = [sum((part.strengths[part.of_option] for part in own), np.zeros(1)) for own in self._parts]
        costs = [group.costs for group in self.groups]
        prices = prices_of_budgets(strengths, costs, room)
        for own, strength, cost in zip(self._parts, strengths, costs, strict=True):
            shares = softmax(strength - prices @ cost)
            for part in own:
                part.mix_(shares)

    def scores(self) -> Scores:
        """What each width lacks in strength; a group of several layers counts once."""
        lacks: dict[Role, dict[str, dict[int, float]]] = {role: {} for role in ROLES}
        for part in self.parts:
            lacks[part.role][part.layer] = dict(zip(part.widths, (-part.strengths).tolist(), strict=True))
        return Scores(lacks["weight"], lacks["input"])

    def _part(self, group: Group, role: Role) -> _Part:
        asked = [int(getattr(bits, role)) for bits in group.options]
        widths = sorted(set(asked))
        mixtures = []
        if len(widths) > 1:
            device = next(self.bank.model.parameters()).device
            for name in group.layers:
                made = self.bank.quantizers[name][role]
                mixture = _Mixture([None if bits == FULL_PRECISION else made[bits] for bits in widths])
                mixture.shares = mixture.shares.to(device)
                setattr(self.bank.layers[name], f"{role}_quantizer", mixture)
                mixtures.append(mixture)
        strengths = np.zeros(len(widths))
        return _Part(group.layers[0], role, widths, [widths.index(bits) for bits in asked], strengths, mixtures)
