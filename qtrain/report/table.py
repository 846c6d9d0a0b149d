"""The closing table of an experiment.

It sets side by side what a newcomer wants to know: full precision, the same model with fewer bits and merely
calibrated, then trained, then trained with a teacher; accuracy, size and arithmetic of each. Runs that differ only in
their seed share a row.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from rich import box
from rich.console import Console
from rich.table import Table

from qtrain.pipeline.summary import FLOAT, gather
from qtrain.report.difference import UNCERTAIN
from qtrain.report.seed_groups import SeedGroup, seed_groups
from qtrain.report.teacher_gain import gain_lines

COLUMNS = (
    "Model", "Bits", "Training", "Top-1 %", "Images", "Change", "Size", "File", "Smaller", "Bits/weight", "GBOPs",
)  # fmt: skip
"""``Images`` are the test images of the accuracy. ``Size`` is what the cost counts, ``File`` the length of the
student's file, which has a header besides."""
WHERE_KNOWN = ("Images", "File")
"""Columns that are left out where no row knows them."""
SEVERAL_SEEDS = "±: standard deviation over seeds; a row without it is of one seed."
ONE_SEED = "Each row is of one seed."
LEFT = 3
"""So many columns are words, aligned to the left; the others are metrics."""


def print_summary(folder: Path | str, *, file: TextIO | None = None) -> None:
    """The closing table of all finished runs in ``folder`` and below, to standard output.

    Framed where ``file`` is a terminal, plain columns otherwise. Runs that cannot be counted follow, with the reason.
    """
    file = file or sys.stdout
    runs, problems = gather(folder)
    groups = seed_groups(run.summary for run in runs)
    columns, rows = closing_table(groups)
    if file.isatty():
        table, console = _framed(columns, rows), Console(file=file)
        # rich leaves columns out where the terminal is too narrow; lines that the terminal wraps show everything.
        needed = console.measure(table, options=console.options.update(max_width=1000)).maximum
        console.width = max(console.width, needed)
        console.print(table)
    else:
        file.write(plain_table(columns, rows))
    notes = [*table_notes(groups), *gain_lines(run.summary for run in runs)]
    file.write("".join(f"{note}\n" for note in notes))
    for problem in problems:
        file.write(f"not in the table: {problem.folder}: {problem.reason}\n")
    file.flush()


def closing_table(groups: Sequence[SeedGroup]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows, without those of :data:`WHERE_KNOWN` that no row knows."""
    rows = table_rows(groups)
    kept = [i for i, column in enumerate(COLUMNS) if column not in WHERE_KNOWN or any(row[i] for row in rows)]
    return tuple(COLUMNS[i] for i in kept), [tuple(row[i] for i in kept) for row in rows]


def table_rows(groups: Sequence[SeedGroup]) -> list[tuple[str, ...]]:
    """The cells of :data:`COLUMNS`. Data set and quantizer are named only where the rows differ in them."""
    datasets = {group.key.dataset for group in groups}
    quantizers = {group.key.quantizer for group in groups} - {""}
    rows: list[tuple[str, ...]] = []
    for group in groups:
        key = group.key
        rows.append(
            (
                f"{key.dataset} {key.model}" if len(datasets) > 1 else key.model,
                "32" if key.way == FLOAT else f"{key.bits} {key.quantizer}" if len(quantizers) > 1 else key.bits,
                " ".join([key.way, *(f"({words})" for words in (key.terms, key.name) if words)]),
                f"{group.top1:.2f}" + (f" ± {group.std:.2f}, {group.seeds} seeds" if group.seeds > 1 else ""),
                "" if group.images is None else str(group.images),
                str(group.change),
                size_text(group.size_bytes),
                size_text(group.file_bytes),
                _known(group.compression, ".1f", "x"),
                _known(group.effective_bits, ".2f"),
                _known(group.bops / 1e9, ".3g"),
            )
        )
    return rows


def table_notes(groups: Sequence[SeedGroup]) -> list[str]:
    """What a reader needs to know of the figures of :func:`table_rows`, a sentence each."""
    notes = []
    if any(group.seeds > 1 for group in groups):
        notes.append(SEVERAL_SEEDS)
    elif groups:
        notes.append(ONE_SEED)
    if any(str(group.change) for group in groups):
        notes.append(UNCERTAIN)
    return notes


def size_text(size: float) -> str:
    """Bytes in a unit that leaves about three digits, ``68.5 kB`` or ``1.08 MB`` (powers of ten); empty for NaN."""
    if size >= 1e6:
        return f"{size / 1e6:.2f} MB"
    return f"{size / 1e3:.1f} kB" if size >= 1e3 else _known(size, ".0f", " B")


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned with spaces, two between them."""
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    lines = []
    for row in [columns, *rows]:
        cells = [c.ljust(w) if i < LEFT else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines) + "\n"


def _framed(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """The same for a terminal, as narrow as the cells allow; a model that all rows share goes to the title."""
    models = {row[0] for row in rows}
    first = 1 if len(models) == 1 else 0
    table = Table(title=" ".join(models) if first else None, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, column in enumerate(columns[first:], start=first):
        width = max((len(row[i]) for row in rows), default=0)
        table.add_column(column.replace("/", "/\n"), justify="left" if i < LEFT else "right", min_width=width)
    for i, row in enumerate(rows):
        if i and rows[i - 1][:2] != row[:2]:
            table.add_section()
        table.add_row(*row[first:])
    return table


def _known(value: float, form: str, unit: str = "") -> str:
    return "" if math.isnan(value) else f"{value:{form}}{unit}"
