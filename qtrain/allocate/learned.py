"""Bits that are learned by gradient: each tensor is a mixture of all its widths (EdMIPS, arXiv 2004.05795)."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from qtrain.allocate.base import Search
from qtrain.allocate.integer_program import IntegerProgram
from qtrain.allocate.problem import Group, Problem
from qtrain.convert.bank import ROLES, QuantizerBank
from qtrain.functional.losses import hard_loss
from qtrain.quantizers.base import Quantizer
from qtrain.spec import FULL_PRECISION, Allocation, Batch, LayerBits, Role, Scores
from qtrain.utils.checks import check_range
from qtrain.utils.eval_mode import evaluating


@final
@dataclass(frozen=True, kw_only=True)
class Learned(Search):
    """Weights and inputs are ``sum_b p_b Q_b(x)`` with ``p = softmax(strength)``, and the strengths are trained.

    The loss is the cross-entropy plus ``sum_m price_m (E[cost_m] / budget_m - 1)``; the expected cost follows from the
    probabilities. EdMIPS has one fixed price. Here each budget's price rises while the expected cost is above it and
    falls while it is below (dual ascent with rate ``price_lr``), so that no price has to be tuned. ``steps`` steps of
    Adam run over the calibration batches in turn: strengths learn at ``lr``, the network's weights and the quantizers'
    scales at ``weight_lr``; 0 leaves them. The answer is the likeliest allocation within the budgets. The network
    itself is not changed.
    """

    needs_scores: ClassVar[bool] = False

    steps: int = 200
    lr: float = 0.05
    weight_lr: float = 1e-4
    price_lr: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("Learned", "[1, inf)", steps=self.steps)
        check_range("Learned", "[0, inf)", lr=self.lr, weight_lr=self.weight_lr, price_lr=self.price_lr)

    def search(self, problem: Problem) -> Allocation:
        """The likeliest bits after training. Raises ``ValueError`` for a problem without a model and images."""
        if problem.bank is None or not problem.batches:
            raise ValueError("Learned: needs a model and images; this problem has none")
        groups = problem.groups()
        with torch.enable_grad():
            mixed = _Mixed(copy.deepcopy(problem.bank), groups)
            self._train(mixed, problem)
        likely = [group.options for group in groups]
        scores: dict[Role, dict[str, dict[int, float]]] = {"weight": {}, "input": {}}
        for group, options in zip(groups, likely, strict=True):
            for role in ROLES:
                # A group of several layers counts once.
                scores[role][group.layers[0]] = mixed.surprise(group, role, options)
        asked = Problem(
            options=problem.options, costs=problem.costs, budgets=problem.budgets,
            scores=Scores(scores["weight"], scores["input"]), ties=problem.ties,
        )  # fmt: skip
        return IntegerProgram().search(asked)

    def _train(self, mixed: "_Mixed", problem: Problem) -> None:
        parameters = [{"params": list(mixed.strengths.parameters()), "lr": self.lr}]
        if self.weight_lr:
            parameters.append({"params": list(mixed.own_parameters()), "lr": self.weight_lr})
        optimizer = torch.optim.Adam(parameters)
        device = problem.batches[0].image.device
        room = torch.tensor(problem.room(), dtype=torch.float32, device=device)
        price = torch.zeros_like(room)
        for step in range(self.steps):
            batch: Batch = problem.batches[step % len(problem.batches)]
            optimizer.zero_grad(set_to_none=True)
            with evaluating(mixed.bank.model):  # statistics of batch norm belong to the trained network
                loss = hard_loss(mixed.bank.model(batch.image), batch.target)
            excess = mixed.expected_costs() / room - 1
            (loss + (price * excess).sum()).backward()
            optimizer.step()
            price = (price + self.price_lr * excess.detach()).clamp(min=0.0)


class _Mixture(nn.Module):
    """``sum_b p_b Q_b(x)``: a tensor at all its widths at once; full precision is the tensor itself."""

    def __init__(self, quantizers: Sequence[Quantizer | None], strengths: nn.Parameter) -> None:
        super().__init__()
        self.quantizers = nn.ModuleList([nn.Identity() if one is None else one for one in quantizers])
        self.strengths = strengths

    def forward(self, x: Tensor) -> Tensor:
        shares = self.strengths.softmax(0)
        return torch.stack([share * one(x) for share, one in zip(shares, self.quantizers, strict=True)]).sum(0)


class _Mixed:
    """The model of a bank in which every group of layers has mixtures, with common strengths for each role."""

    def __init__(self, bank: QuantizerBank, groups: Sequence[Group]) -> None:
        self.bank, self.groups = bank, groups
        self.device = next(bank.model.parameters()).device
        bank.use_({layer: group.options[0] for group in groups for layer in group.layers})
        self.strengths = nn.ParameterDict()
        self._widths: dict[tuple[str, Role], list[int]] = {}
        layers = bank.layers
        for number, group in enumerate(groups):
            for role in ROLES:
                widths = sorted({int(getattr(bits, role)) for bits in group.options})
                self._widths[group.layers[0], role] = widths
                own = nn.Parameter(torch.zeros(len(widths), device=self.device))
                self.strengths[f"{number}_{role}"] = own
                if len(widths) > 1:
                    for name in group.layers:
                        made = bank.quantizers[name][role]
                        quantizers = [None if bits == FULL_PRECISION else made[bits] for bits in widths]
                        setattr(layers[name], f"{role}_quantizer", _Mixture(quantizers, own))

    def own_parameters(self) -> Iterator[nn.Parameter]:
        """Weights of the network and scales of the quantizers."""
        chosen = {id(one) for one in self.strengths.parameters()}
        return (one for one in self.bank.model.parameters() if id(one) not in chosen and one.requires_grad)

    def expected_costs(self) -> Tensor:
        """The layers' part of each budget, (M,), that the probabilities lead one to expect."""
        total = torch.zeros(len(self.groups[0].costs), device=self.device)
        for number, group in enumerate(self.groups):
            weight, input = (self._shares(number, group, role) for role in ROLES)
            joint = weight * input
            costs = torch.tensor(group.costs, dtype=torch.float32, device=self.device)
            total = total + (costs * (joint / joint.sum())).sum(1)
        return total

    def surprise(self, group: Group, role: Role, options: Sequence[LayerBits]) -> dict[int, float]:
        """``-log p`` of each width of ``role``."""
        number = self.groups.index(group)
        with torch.no_grad():
            shares = (-self.strengths[f"{number}_{role}"].log_softmax(0)).tolist()
        return dict(zip(self._widths[group.layers[0], role], shares, strict=True))

    def _shares(self, number: int, group: Group, role: Role) -> Tensor:
        """The probability of each option's width, (O,)."""
        widths = self._widths[group.layers[0], role]
        shares: Tensor = self.strengths[f"{number}_{role}"].softmax(0)
        return shares[torch.tensor([widths.index(getattr(bits, role)) for bits in group.options], device=self.device)]
