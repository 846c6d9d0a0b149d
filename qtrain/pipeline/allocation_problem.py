"""The question that a search over bits answers, as a run's settings ask it: widths, pins, ties, costs and budgets."""

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor

from qtrain.allocate.base import Search
from qtrain.allocate.budgets import budget_of
from qtrain.allocate.problem import Problem
from qtrain.allocate.uniform import checked
from qtrain.convert.bank import ROLES, QuantizerBank, Widths
from qtrain.costs.count import count
from qtrain.costs.geometry import layer_geometries
from qtrain.costs.tables import bytes_outside, cost_table
from qtrain.pipeline.conversion import target_of
from qtrain.settings.run_settings import RunSettings
from qtrain.spec import FULL_PRECISION, Allocation, Batch, CostTable, LayerBits, LayerNames
from qtrain.utils.suggestions import close_matches


def problem_of(
    settings: RunSettings,
    bank: QuantizerBank,
    batches: Sequence[Batch],
    *,
    pinned: Allocation,
    reference: Allocation,
    loss: Callable[[Allocation], float],
) -> Problem:
    """The search's problem, still without scores.

    ``pinned`` layers have one option, and budgets in percent are parts of what ``reference`` costs.

    Raises ``ValueError`` for a budget that cannot be met, a cost that there is not, and a pattern that fits no layer.
    """
    layers, example = bank.names, batches[0].image[:1]
    costs = _costs(settings, bank, example, layers)
    return Problem(
        options=_options(settings, bank, layers, pinned),
        costs=costs,
        budgets=_budgets(settings, costs, reference),
        ties=_ties(settings, bank, layers),
        loss=loss,
        bank=bank,
        batches=batches,
        seed=settings.seed,
    )


def widths(settings: RunSettings, further: Iterable[LayerBits]) -> Widths:
    """All widths that an allocation may need: those to choose from, the pinned ones and the reference's."""
    pairs = list(further)
    weight = {*settings.allocate.weight, *(bits.weight for bits in pairs)}
    input = {*_input_widths(settings), *(bits.input for bits in pairs)}
    return Widths(tuple(sorted(weight)), tuple(sorted(input)))


def _input_widths(settings: RunSettings) -> tuple[int, ...]:
    """Widths of inputs to choose from: with a target those that it computes with, since fewer bits gain nothing there.

    Fewer bits of a weight make the file shorter in any case.
    """
    target = target_of(settings)
    if target is None:
        return settings.allocate.input
    own = tuple(bits for bits in settings.allocate.input if bits in (*target.input_bits, FULL_PRECISION))
    return own or tuple(target.input_bits)


def on_target(settings: RunSettings, allocation: Allocation) -> dict[str, LayerBits]:
    """``allocation`` as a target computes it: inputs of a width that it lacks have the next wider one."""
    target = target_of(settings)
    if target is None:
        return dict(allocation)
    known = sorted({*target.input_bits, FULL_PRECISION})
    return {
        name: LayerBits(bits.weight, next(width for width in known if width >= bits.input))
        for name, bits in allocation.items()
    }


def pinned_bits(settings: RunSettings, search: Search, layers: LayerNames) -> dict[str, LayerBits]:
    """Layers that keep their bits: those at the ends, then what ``allocate.pinned`` says, whose last pattern counts.

    Raises ``ValueError`` for pins that are no bits, fit no layer, or have inputs of a width that a target lacks.
    """
    ends = {name: search.reference.first for name in layers if name in layers.first and search.first is not None}
    ends |= {name: search.reference.last for name in layers if name in layers.last and search.last is not None}
    found = on_target(settings, ends)
    target = target_of(settings)
    for pattern, pair in settings.allocate.pinned.items():
        if not isinstance(pair, list) or len(pair) != 2 or not all(type(bits) is int for bits in pair):
            raise ValueError(f"pinned.{pattern}: must be [weight, input] bits such as [8, 8], got {pair!r}")
        bits = checked(f"pinned.{pattern}.", LayerBits(*pair))
        if target is not None and bits.input not in (*target.input_bits, FULL_PRECISION):
            known = " or ".join(map(str, target.input_bits))
            raise ValueError(
                f"pinned.{pattern}: {target.name} computes inputs of {known} bits, so {bits.input} gain nothing; "
                f"take [{bits.weight}, {target.input_bits[0]}], or target=none"
            )
        found |= dict.fromkeys(_matching(f"pinned.{pattern}", pattern, layers), bits)
    return found


def by_policies(bank: QuantizerBank, allocation: Allocation) -> dict[str, LayerBits]:
    """``allocation`` with the bits that policies decide."""
    return {
        name: LayerBits(*(bank.pinned.get((name, role), getattr(bits, role)) for role in ROLES))
        for name, bits in allocation.items()
    }


def _matching(key: str, pattern: str, layers: Sequence[str]) -> list[str]:
    names = fnmatch.filter(layers, pattern)
    if not names:
        raise ValueError(f"{key}: fits no quantizable layer{close_matches(pattern, layers)}")
    return names


def _options(
    settings: RunSettings, bank: QuantizerBank, layers: LayerNames, pinned: Mapping[str, LayerBits]
) -> dict[str, tuple[LayerBits, ...]]:
    """The bits that each layer may have; a policy that decides a width leaves no choice of it."""
    found = {}
    for name in layers:
        offered = bank.options[name]
        weights, inputs = ({getattr(bits, role) for bits in offered} for role in ("weight", "input"))
        found[name] = tuple(
            bits
            for bits in offered
            if (len(weights) == 1 or bits.weight in settings.allocate.weight)
            and (len(inputs) == 1 or bits.input in _input_widths(settings))
        )
        if name in pinned:
            found[name] = (pinned[name],)
    return found


def _ties(settings: RunSettings, bank: QuantizerBank, layers: LayerNames) -> list[Sequence[str]]:
    """Layers that get the same bits: by ``allocate.tied``, and those that share a quantizer."""
    asked: list[Sequence[str]] = [
        [name for pattern in patterns for name in _matching(f"tied.{key}", pattern, layers)]
        for key, patterns in settings.allocate.tied.items()
    ]
    shared = [names for role in ROLES for names in bank.tied[role].values()]
    return [*asked, *([name for name in names if name in layers] for names in shared)]


def _costs(settings: RunSettings, bank: QuantizerBank, example: Tensor, layers: LayerNames) -> dict[str, CostTable]:
    """What each layer costs at each of its options, by metric."""
    metrics = {name: chosen.build() for name, chosen in settings.allocate.costs.items() if chosen is not None}
    geometries = layer_geometries(bank.model, example)
    rest = count(bank.model, example).layers
    options = {name: bank.options[name] for name in layers}
    outside = bytes_outside(bank.model, [geometry.name for geometry in geometries])
    return {
        name: cost_table(
            metric, geometries, options, bank.storage_bits, outside, factor_bits=bank.operand_bits, rest=rest
        )
        for name, metric in metrics.items()
    }


def _budgets(settings: RunSettings, costs: Mapping[str, CostTable], reference: Allocation) -> dict[str, float]:
    budgets = {}
    for name, value in settings.allocate.budgets.items():
        if value is None:
            continue
        if name not in costs:
            close = close_matches(name, costs)
            raise ValueError(f"budgets.{name}: there is no such cost{close}; +cost@allocate.costs.{name}=... adds one")
        table = costs[name]
        budgets[name] = budget_of(name, value, unit=table.unit, reference=table.total(reference))
    return budgets
