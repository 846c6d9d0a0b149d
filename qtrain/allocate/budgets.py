"""A budget as people write it: a number, a number with a unit, or a part of what uniform bits cost."""

import re
from typing import Any

FACTORS = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30}
"""Prefixes of bytes and of operations. A kilobyte has 1,000 bytes, a KiB 1,024."""

BYTES = "B"
"""The short form of ``bytes``."""

NUMBER = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)\s*([%A-Za-z0-9]*)\s*")


def budget_of(name: str, value: Any, *, unit: str, reference: float) -> float:
    """The most that the cost ``name`` may be, in ``unit``.

    ``value`` is a number in ``unit``; or a text with the unit or a prefix of it behind the number, such as ``120 kB``,
    ``0.6 G``, ``3 ms``; or a percentage of ``reference``. Raises ``ValueError`` for anything else.

    >>> budget_of("size_bytes", "120 kB", unit="bytes", reference=0.0)
    120000.0
    >>> budget_of("bops", "50%", unit="operations", reference=3e9)
    1500000000.0
    """
    match = NUMBER.fullmatch(str(value)) if not isinstance(value, bool) else None
    if match is None:
        raise ValueError(f"budgets.{name}: must be {_forms(unit)}, got {value!r}")
    number, suffix = float(match[1]), match[2]
    if suffix == "%":
        return number / 100 * reference
    prefix = suffix.removesuffix(BYTES) if unit == "bytes" else suffix.removesuffix(unit)
    if suffix in ("", unit) or prefix == "":
        return number
    if prefix in FACTORS and unit in ("bytes", "operations"):
        return number * FACTORS[prefix]
    raise ValueError(f"budgets.{name}: must be {_forms(unit)}, got {value!r}")


def _forms(unit: str) -> str:
    example = {"bytes": "120 kB", "operations": "0.6 G"}.get(unit, f"3 {unit}")
    return f"a number of {unit} such as {example!r}, or a part of what the uniform bits cost such as '80%'"
