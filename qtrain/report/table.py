"""The closing table of an experiment.

It sets side by side what a newcomer wants to know: full precision, the same model with fewer bits and merely
calibrated, then trained, then trained with a teacher; accuracy, size and arithmetic of each. Runs that differ only in
their seed share a row.
"""

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple, TextIO

from rich import box
from rich.console import Console
from rich.table import Table

from qtrain.pipeline.summary import CALIBRATED, DISTILLED, FLOAT, WAYS, RunSummary, gather
from qtrain.spec import FULL_PRECISION

COLUMNS = ("Model", "Bits", "Training", "Top-1 %", "Change", "Size", "File", "Smaller", "Bits/weight", "GBOPs")
"""``Size`` is what the cost counts, ``File`` the length of the student's file, which has a header besides."""
LEFT = 3
"""So many columns are words, aligned to the left; the others are metrics."""


class GroupKey(NamedTuple):
    """What the runs of one row have in common; ``name`` only where they are not repeats with another seed."""

    dataset: str
    model: str
    quantizer: str
    bits: str
    way: str
    terms: str
    name: str


@dataclass(frozen=True)
class SeedGroup:
    """One row: means over the runs of ``key``. ``top1`` in percent, ``change`` and ``std`` (sample standard deviation)
    in points, sizes in bytes; a metric that no run knows is NaN. ``product`` is weight bits times input bits."""

    key: GroupKey
    product: float
    seeds: int
    top1: float
    std: float
    change: float
    size_bytes: float
    file_bytes: float
    compression: float
    effective_bits: float
    bops: float
    fp_bops: float

    @property
    def bops_saved(self) -> float:
        """How many times fewer bit operations than in full precision; NaN where that is not known."""
        return self.fp_bops / self.bops if self.bops else math.nan


def print_summary(folder: Path | str, *, file: TextIO | None = None) -> None:
    """The closing table of all finished runs in ``folder`` and below, to standard output.

    Framed where ``file`` is a terminal, plain columns otherwise. Runs that cannot be counted follow, with the reason.
    """
    file = file or sys.stdout
    runs, problems = gather(folder)
    columns, rows = closing_table(seed_groups(run.summary for run in runs))
    if file.isatty():
        table, console = _framed(columns, rows), Console(file=file)
        # rich leaves columns out where the terminal is too narrow; lines that the terminal wraps show everything.
        needed = console.measure(table, options=console.options.update(max_width=1000)).maximum
        console.width = max(console.width, needed)
        console.print(table)
    else:
        file.write(plain_table(columns, rows))
    for problem in problems:
        file.write(f"not in the table: {problem.folder}: {problem.reason}\n")
    file.flush()


def seed_groups(summaries: Iterable[RunSummary]) -> list[SeedGroup]:
    """The rows: by data set and model, most bits first, each in the order of :data:`WAYS`."""
    groups: dict[GroupKey, list[tuple[float, RunSummary]]] = {}
    for summary in summaries:
        for key, top1 in _accuracies(summary):
            groups.setdefault(key, []).append((top1, summary))
    for key, members in list(groups.items()):
        repeats = key.way in (FLOAT, CALIBRATED) or len({s.seed for _, s in members}) == len(members)
        if not repeats:  # they differ in something that the key does not hold: tell them apart by name
            del groups[key]
            for top1, summary in members:
                groups.setdefault(key._replace(name=summary.name or "?"), []).append((top1, summary))
    found = [_group(key, members) for key, members in groups.items()]
    return sorted(found, key=order)


def order(group: SeedGroup) -> tuple[str, str, float, str, str, int, str, str]:
    """What rows are sorted by."""
    key = group.key
    return key.dataset, key.model, -group.product, key.quantizer, key.bits, WAYS.index(key.way), key.terms, key.name


def closing_table(groups: Sequence[SeedGroup]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows, without the column ``File`` where no row knows it."""
    rows = table_rows(groups)
    kept = [i for i, column in enumerate(COLUMNS) if column != "File" or any(row[i] for row in rows)]
    return tuple(COLUMNS[i] for i in kept), [tuple(row[i] for i in kept) for row in rows]


def table_rows(groups: Sequence[SeedGroup]) -> list[tuple[str, ...]]:
    """The cells of :data:`COLUMNS`. Data set and quantizer are named only where the rows differ in them."""
    datasets = {group.key.dataset for group in groups}
    quantizers = {group.key.quantizer for group in groups} - {""}
    rows: list[tuple[str, ...]] = []
    for group in groups:
        key = group.key
        several = group.seeds > 1 and key.way != FLOAT
        rows.append(
            (
                f"{key.dataset} {key.model}" if len(datasets) > 1 else key.model,
                "32" if key.way == FLOAT else f"{key.bits} {key.quantizer}" if len(quantizers) > 1 else key.bits,
                " ".join([key.way, *(f"({words})" for words in (key.terms, key.name) if words)]),
                f"{group.top1:.2f}" + (f" ± {group.std:.2f}, {group.seeds} seeds" if several else ""),
                _known(group.change, "+.2f"),
                size_text(group.size_bytes),
                size_text(group.file_bytes),
                _known(group.compression, ".1f", "x"),
                _known(group.effective_bits, ".2f"),
                _known(group.bops / 1e9, ".3g"),
            )
        )
    return rows


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


def _accuracies(summary: RunSummary) -> Iterator[tuple[GroupKey, float]]:
    """The rows that one run adds to: its own, and those of the model that it started from."""
    terms = summary.distill if summary.way == DISTILLED and isinstance(summary.distill, str) else ""
    own = GroupKey(
        dataset=summary.dataset or "?",
        model=summary.model or "?",
        quantizer=summary.quantizer or "",
        bits=summary.bits,
        way=summary.way,
        terms="" if terms.lower() in ("true", "yes") else terms,
        name="",
    )
    before = own._replace(quantizer="", bits=FLOAT, way=FLOAT, terms="")
    if summary.full_precision:
        own = before
    elif summary.fp_top1 is not None:
        yield before, summary.fp_top1
    if summary.ptq_top1 is not None and not summary.full_precision:
        yield own._replace(way=CALIBRATED, terms=""), summary.ptq_top1
    if summary.top1 is not None:
        # What task=calibrate left is one of several ways to calibrate; what training began from is not.
        yield own._replace(name=summary.name or "") if own.way == CALIBRATED else own, summary.top1


def _group(key: GroupKey, members: list[tuple[float, RunSummary]]) -> SeedGroup:
    accuracies = [top1 for top1, _ in members]
    summaries = [summary for _, summary in members]
    full = key.way == FLOAT
    changes = [] if full else [top1 - s.fp_top1 for top1, s in members if s.fp_top1 is not None]
    return SeedGroup(
        key=key,
        product=float(FULL_PRECISION**2) if full else _product(summaries[0]),
        seeds=len({s.seed for s in summaries}),
        top1=fmean(accuracies),
        std=stdev(accuracies) if len(accuracies) > 1 else 0.0,
        change=_mean(changes),
        size_bytes=_mean(s.fp_size_bytes if full else s.size_bytes for s in summaries),
        file_bytes=_mean(s.file_bytes for s in summaries if s.full_precision or not full),
        compression=1.0 if full else _mean(s.compression for s in summaries),
        effective_bits=float(FULL_PRECISION) if full else _mean(s.effective_bits for s in summaries),
        bops=_mean(s.fp_bops if full else s.bops for s in summaries),
        fp_bops=_mean(s.fp_bops for s in summaries),
    )


def _mean(values: Iterable[float | None]) -> float:
    known = [value for value in values if value is not None]
    return fmean(known) if known else math.nan


def _product(summary: RunSummary) -> float:
    """Weight bits times input bits, so that W8A8 stands before W4A8 before W4A4; 0 where they are words."""
    product = 1.0
    for bits in (summary.w_bits, summary.a_bits):
        product *= bits if isinstance(bits, int | float) else 0
    return product


def _known(value: float, form: str, unit: str = "") -> str:
    return "" if math.isnan(value) else f"{value:{form}}{unit}"
