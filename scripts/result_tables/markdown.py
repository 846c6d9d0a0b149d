"""Tables in Markdown, and what stands below them."""

from __future__ import annotations

from collections.abc import Sequence


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, figures: range) -> str:
    """``figures`` are the columns of numbers, which are aligned to the right."""
    rule = ["---:" if i in figures else "---" for i in range(len(columns))]
    lines = [columns, rule, *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def notes_below(notes: Sequence[str]) -> str:
    """A paragraph below a table."""
    return f"\n{' '.join(notes)}\n" if notes else ""


def figure(value: float | None, unit: float, form: str) -> str:
    return "" if value is None else format(value * unit, form)


def float_or_none(text: str) -> float | None:
    return float(text) if text else None
