"""What a search over bits found, in words: layer by layer, then beside uniform bits."""

from collections.abc import Iterator, Sequence

from qtrain.allocate.pareto import Point
from qtrain.pipeline.allocate_run import AllocateRun
from qtrain.report.formatting import metric_text
from qtrain.report.table import plain_table
from qtrain.spec import FULL_PRECISION, Allocation, CostTable, LayerBits

POINTS = 10
"""So many points of a front are listed, evenly chosen."""


def allocation_table(made: AllocateRun) -> str:
    """A row for each layer with its bits, its part of the score and of the costs; then found beside uniform."""
    parts = [plain_table(*layer_table(made)), plain_table(*total_table(made))]
    if len(made.found.front) > 1:
        parts.append(plain_table(*front_table(made)))
    return "\n".join(parts)


def layer_table(made: AllocateRun) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    found = made.found
    costs = found.problem.costs
    total = found.problem.scores.total(found.allocation) or 1.0
    rows = [
        (
            name,
            _text(bits),
            f"{found.problem.scores.of(name, bits) / total:.1%}",
            *(metric_text(metric, table.layers[name][bits]) + _mark(name, table) for metric, table in costs.items()),
        )
        for name, bits in found.allocation.items()
    ]
    columns = ("Layer", "Bits", "Score", *_headings(made))
    return columns, rows if found.problem.scores.weight else [(*row[:2], "", *row[3:]) for row in rows]


def total_table(made: AllocateRun) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    columns = ("Model", "Bits", "Score", *_headings(made), "Loss")
    return columns, [
        _total(made, "found", made.found.allocation),
        _total(made, f"uniform {_text(_typical(made.found.reference))}", made.found.reference),
        ("budget", "", "", *(_budget(made, name) for name in made.found.problem.costs), ""),
        ("full precision", "", "", *("" for _ in made.found.problem.costs), f"{made.losses['full precision']:.4f}"),
    ]


def _total(made: AllocateRun, name: str, allocation: Allocation) -> tuple[str, ...]:
    predicted = made.found.predicted(allocation)
    weights = [bits.weight for bits in allocation.values()]
    inputs = [bits.input for bits in allocation.values()]
    bits = f"W{sum(weights) / len(weights):.2f} A{sum(inputs) / len(inputs):.2f}"
    score = f"{predicted['score']:.4g}" if made.found.problem.scores.weight else ""
    costs = (metric_text(metric, predicted[metric]) for metric in made.found.problem.costs)
    return (name, bits, score, *costs, f"{made.losses['uniform' if name.startswith('uniform') else name]:.4f}")


def _budget(made: AllocateRun, name: str) -> str:
    budgets = made.found.problem.budgets
    return metric_text(name, budgets[name]) if name in budgets else ""


def front_table(made: AllocateRun) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    names = list(made.found.problem.budgets)
    columns = ("Front", "Bits", "Score", *(_heading(made, name) for name in names))
    return columns, [
        (
            str(number),
            _total(made, "found", point.allocation)[1],
            f"{point.score:.4g}",
            *(metric_text(name, point.costs[name]) for name in names),
        )
        for number, point in _spread(made.found.front)
    ]


def _spread(front: Sequence[Point]) -> Iterator[tuple[int, Point]]:
    step = max(1, (len(front) - 1) // (POINTS - 1))
    chosen = sorted({*range(0, len(front), step), len(front) - 1})
    return ((number + 1, front[number]) for number in chosen)


def _headings(made: AllocateRun) -> list[str]:
    return [_heading(made, name) for name in made.found.problem.costs]


def _heading(made: AllocateRun, name: str) -> str:
    return {"size_bytes": "Size", "bops": "GBOPs"}.get(name, f"{name} ({made.found.problem.costs[name].unit})")


def _mark(layer: str, table: CostTable) -> str:
    return " (est.)" if layer in table.estimated else ""


def _text(bits: LayerBits) -> str:
    return "".join(f"{side}{'float' if b == FULL_PRECISION else b}" for side, b in zip("WA", bits, strict=True))


def _typical(allocation: Allocation) -> LayerBits:
    pairs = list(allocation.values())
    return max(pairs, key=pairs.count)
