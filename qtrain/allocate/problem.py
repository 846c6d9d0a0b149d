"""The question that a search over bits answers: which options there are, what they cost, how much each one hurts."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

import numpy as np
from numpy.typing import NDArray

from qtrain.convert.bank import QuantizerBank
from qtrain.spec import Allocation, Batch, CostTable, LayerBits, Scores

Floats = NDArray[np.float64]

ROUNDING = 1e-12
"""By this part of a budget a sum of floats may exceed it; less than one byte or one operation up to 10^12 of them."""


def _no_loss(allocation: Allocation) -> float:
    raise ValueError("this problem has no model to measure; choose an allocator that reads scores alone")


@final
@dataclass(frozen=True)
class Group:
    """Layers that get the same bits, and for each of their O options what it adds.

    ``options`` are the bits to choose from. ``scores`` (O,) are the rises of the loss, pairs left out, and ``costs``
    (M, O) the shares of the M budgets, as parts of each budget: 1 is a whole budget.
    """

    layers: tuple[str, ...]
    options: tuple[LayerBits, ...]
    scores: Floats
    costs: Floats

    @property
    def bits(self) -> Floats:
        """The bits of weights and inputs of all layers, for each option (O,): of equal scores the most bits count."""
        return np.array([float(len(self.layers) * sum(bits)) for bits in self.options])


@final
@dataclass(frozen=True)
class Problem:
    """Choose one of ``options`` for each layer so that no budget is exceeded and the loss rises least.

    Where several allocations have the least score, as with a layer whose output does not count, searches that read
    scores alone choose the one with the most bits, summed over weights and inputs: they are free.

    ``options`` maps the layers, in the order in which they run, to the bits that each may have; one option is a pinned
    layer. ``ties`` are layers that must get the same bits. ``costs`` are tables by metric, and ``budgets`` upper bounds
    of some, in the table's unit. ``scores`` estimate what each choice adds to the loss. ``loss`` measures an allocation
    on the calibration images, in nats; ``bank`` and ``batches`` are the model and these images themselves. Raises
    ``ValueError`` where a budget has no table, where tied layers have no option in common, and where a budget is below
    the cheapest there is.
    """

    options: Mapping[str, tuple[LayerBits, ...]]
    costs: Mapping[str, CostTable] = field(default_factory=dict)
    budgets: Mapping[str, float] = field(default_factory=dict)
    scores: Scores = field(default_factory=lambda: Scores({}, {}))
    ties: Sequence[Sequence[str]] = ()
    loss: Callable[[Allocation], float] = _no_loss
    bank: QuantizerBank | None = None
    batches: Sequence[Batch] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.budgets:
            if name not in self.costs:
                raise ValueError(f"budgets.{name}: there is no such cost; there are {', '.join(self.costs)}")
        for layers, options in self._tied():
            if not options:
                raise ValueError(f"tied: {', '.join(layers)} have no bits in common; pin them alike, or untie them")
        for name, budget in self.budgets.items():
            cheapest = self.costs[name].total(self.cheapest(name))
            if cheapest > budget * (1 + ROUNDING):
                unit = self.costs[name].unit
                raise ValueError(
                    f"budgets.{name}: {budget:,.6g} {unit} cannot be reached; the cheapest that these widths allow is "
                    f"{cheapest:,.6g} {unit}"
                )

    def groups(self) -> list[Group]:
        """What there is to choose, layer by layer or tie by tie, in the order in which they run."""
        names = list(self.budgets)
        return [
            Group(
                layers=layers,
                options=options,
                scores=np.array([sum(self.scores.of(layer, bits) for layer in layers) for bits in options]),
                costs=np.array([[self._share(name, layers, bits) for bits in options] for name in names]).reshape(
                    len(names), len(options)
                ),
            )
            for layers, options in self._tied()
        ]

    def room(self) -> Floats:
        """What each budget leaves to the layers once the fixed part is paid, (M,), as a part of the budget."""
        return np.array([1 - self.costs[name].fixed / (budget or 1.0) for name, budget in self.budgets.items()])

    def fits(self, allocation: Allocation) -> bool:
        """Whether ``allocation`` exceeds no budget."""
        return all(
            self.costs[name].total(allocation) <= budget * (1 + ROUNDING) for name, budget in self.budgets.items()
        )

    def cheapest(self, name: str) -> Allocation:
        """The allocation of the least cost ``name``; of equal ones that with the most bits."""

        def price(layers: tuple[str, ...], bits: LayerBits) -> tuple[float, int]:
            return sum(self._cost(name, layer, bits) for layer in layers), -sum(bits)

        chosen = [(layers, min(options, key=lambda o: price(layers, o))) for layers, options in self._tied()]
        return self.ordered({layer: bits for layers, bits in chosen for layer in layers})

    def ordered(self, allocation: Allocation) -> Allocation:
        """``allocation`` with its layers in the order in which they run."""
        return {layer: allocation[layer] for layer in self.options}

    def _cost(self, name: str, layer: str, bits: LayerBits) -> float:
        options = self.costs[name].layers.get(layer)
        return 0.0 if options is None else options[bits]

    def _share(self, name: str, layers: tuple[str, ...], bits: LayerBits) -> float:
        return sum(self._cost(name, layer, bits) for layer in layers) / (self.budgets[name] or 1.0)

    def _tied(self) -> Iterator[tuple[tuple[str, ...], tuple[LayerBits, ...]]]:
        """Layers that get the same bits, and the bits that all of them may have."""
        group_of = {layer: {layer} for layer in self.options}
        for tie in self.ties:
            together = set().union(*(group_of[layer] for layer in tie))
            group_of |= dict.fromkeys(together, together)
        seen: set[str] = set()
        for layer in self.options:
            if layer not in seen:
                layers = tuple(name for name in self.options if name in group_of[layer])
                seen |= set(layers)
                common = set.intersection(*(set(self.options[name]) for name in layers))
                yield layers, tuple(bits for bits in self.options[layer] if bits in common)


def chosen(groups: Sequence[Group], picks: Sequence[int]) -> Allocation:
    """The allocation in which each of ``groups`` has its option ``picks``."""
    return {layer: group.options[pick] for group, pick in zip(groups, picks, strict=True) for layer in group.layers}
