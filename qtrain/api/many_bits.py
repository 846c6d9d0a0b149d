"""The width of a student of many bits: chosen by name, or as the widest that a budget allows."""

from collections.abc import Mapping

from torch import Tensor, nn

from qtrain.allocate.budgets import budget_of
from qtrain.api.files import cost
from qtrain.nn.many_bits import ManyBits

COUNTED = {"size_bytes": "bytes", "effective_bits": "bits", "bops": "bit operations"}
"""Costs that :func:`qtrain.cost` counts and that depend on the width, with their units."""


def set_bits(
    student: nn.Module,
    bits: int | None = None,
    *,
    budget: Mapping[str, float | str] | None = None,
    images: Tensor | None = None,
    measured: Mapping[int, Mapping[str, float]] | None = None,
) -> int:
    """Let ``student``, of many bits, compute with ``bits`` bits from now on, and return them; nothing is loaded.

    Or with the most bits whose costs are all within ``budget``: ``size_bytes`` (of this width alone),
    ``effective_bits`` and ``bops`` are counted on ``images`` (N, C, H, W) as :func:`cost` does. Any other name is
    looked up in ``measured``, what was measured of each width: ``{8: {"latency_ms": 3.1}, 4: {"latency_ms": 1.9}}``.
    A limit is a number, one with a unit such as ``"120 kB"``, or a part of what the widest costs such as ``"50%"``.

    Raises ``ValueError``, in one line, for a student of one width, a width that there is not, a cost that is not known,
    and for a budget below the cheapest width, which it names.

    >>> import torch, qtrain
    >>> images = torch.rand(8, 4)
    >>> student = qtrain.quantize(torch.nn.Sequential(torch.nn.Linear(4, 4)), images, widths=[8, 4, 2], ends=None)
    >>> qtrain.set_bits(student, 2)
    2
    >>> qtrain.set_bits(student, budget={"bops": 300}, images=images)
    4
    """
    if not isinstance(student, ManyBits):
        raise ValueError(
            f"set_bits: a {type(student).__name__} has one width only; many_bits.widths, or widths=... of "
            "qtrain.quantize, make a student of several"
        )
    if (bits is None) == (budget is None):
        raise ValueError("set_bits: give bits, or a budget, and not both")
    if bits is None:
        assert budget is not None
        bits = _widest_within(student, budget, images, measured or {})
    student.use_(bits)
    return bits


def _widest_within(
    student: ManyBits,
    budget: Mapping[str, float | str],
    images: Tensor | None,
    measured: Mapping[int, Mapping[str, float]],
) -> int:
    cheapest = ""
    limits: dict[str, float] = {}
    for width, one in student.students.items():
        costs = {**measured.get(width, {})}
        if images is not None:
            report = cost(one, images)
            costs |= {name: float(getattr(report, name)) for name in COUNTED}
        if unknown := [name for name in budget if name not in costs]:
            how = "give images=..." if unknown[0] in COUNTED else f"give measured={{{width}: {{{unknown[0]!r}: ...}}}}"
            raise ValueError(f"set_bits: {unknown[0]} of {width} bits is not known; {how}")
        limits = limits or {  # of the first, which is the widest
            name: budget_of(name, limit, unit=COUNTED.get(name, name), reference=costs[name])
            for name, limit in budget.items()
        }
        if all(costs[name] <= limit for name, limit in limits.items()):
            return width
        cheapest = ", ".join(f"{name} {costs[name]:g}" for name in budget)
    raise ValueError(f"set_bits: no width is within the budget; the cheapest, {width} bits, has {cheapest}")
