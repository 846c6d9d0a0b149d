"""A budget as people write it: a number, a number with a unit, or a part of what uniform bits cost."""

import re
from typing import Any

PREFIXES = {"n": 1e-9, "u": 1e-6, "m": 1e-3, "": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12,
            "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30}  # fmt: skip
"""A kilobyte has 1,000 bytes, a KiB 1,024."""

BASES = {"bytes": ("", "B"), "bit operations": ("", ""), "us": ("u", "s"), "uJ": ("u", "J")}
"""Unit of a cost -> the prefix in it and the symbol behind; others are written as they are."""

EXAMPLES = {"bytes": "120 kB", "bit operations": "0.6 G", "us": "3 ms", "uJ": "0.5 mJ"}

NUMBER = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)\s*([%A-Za-z0-9 ]*?)\s*")


def budget_of(name: str, value: Any, *, unit: str, reference: float) -> float:
    """The most that the cost ``name`` may be, in ``unit``.

    ``value`` is a number in ``unit``; or a text with a unit behind the number, such as ``120 kB``, ``0.6 G``, ``3 ms``;
    or a percentage of ``reference``. Raises ``ValueError`` for anything else.

    >>> budget_of("size_bytes", "120 kB", unit="bytes", reference=0.0)
    120000.0
    >>> budget_of("bops", "50%", unit="bit operations", reference=3e9)
    1500000000.0
    """
    match = NUMBER.fullmatch(str(value)) if not isinstance(value, bool) else None
    if match is not None:
        number, suffix = float(match[1]), match[2]
        if suffix == "%":
            return number / 100 * reference
        if suffix in ("", unit):
            return number
        own, symbol = BASES.get(unit, ("", unit))
        prefix = suffix.removesuffix(symbol)
        if suffix.endswith(symbol) and prefix in PREFIXES:
            return number * PREFIXES[prefix] / PREFIXES[own]
    example = EXAMPLES.get(unit, f"3 {unit}")
    raise ValueError(
        f"budgets.{name}: must be a number of {unit} such as {example!r}, or a part of what the uniform bits cost such "
        f"as '80%', got {value!r}"
    )
