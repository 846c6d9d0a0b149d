"""The variants of an experiment over their seeds, out of the rows of its results."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import fields
from typing import NamedTuple

from qtrain.pipeline.summary import NUMBERS, RIGHT, RunSummary
from qtrain.report.difference import UNCERTAIN, Accuracy, Difference, difference
from qtrain.report.table import ONE_SEED, SEVERAL_SEEDS
from result_tables.markdown import markdown_table, notes_below

SEED = re.compile(r"-seed\d+$")
CHANGE = re.compile(r"[+-][\d.]+ \([\d.]+\)( ~)?")
"""A difference with its standard error, as tables show it."""
MADE = ("train", "calibrate")
"""Tasks that leave a student."""


class Variant(NamedTuple):
    """One variant of an experiment over its seeds: training runs, and how long a step of it takes."""

    name: str
    runs: list[dict[str, str]]
    step: dict[str, str] | None

    def mean(self, column: str) -> float | None:
        """Of the runs; ``None`` where one of them does not have the figure."""
        texts = [run.get(column, "") for run in self.runs]
        return statistics.fmean(map(float, texts)) if texts and all(texts) else None

    @property
    def std(self) -> float | None:
        """Sample standard deviation of top-1 over seeds, in points; ``None`` for a single one."""
        return statistics.stdev(float(run["top1"]) for run in self.runs) if len(self.runs) > 1 else None

    def by_seed(self, column: str) -> dict[str, Accuracy]:
        """The accuracy of each seed; without the runs that do not have it."""
        right = RIGHT[column]
        return {run["seed"]: Accuracy(float(run[column]), run.get(right, "")) for run in self.runs if run.get(column)}

    @property
    def images(self) -> int | None:
        """The number of test images; ``None`` where it is not known."""
        mean = self.mean("test_images")
        return None if mean is None else round(mean)

    def against(self, other: Variant) -> Difference:
        """How much more accurate this is than ``other``, which has the same test images."""
        return difference(self.by_seed("top1"), other.by_seed("top1"), images=self.images)

    @property
    def accuracy(self) -> str:
        """``87.12``, or ``87.12 ± 0.20, 3 seeds``, in percent."""
        top1, std = self.mean("top1"), self.std
        assert top1 is not None
        return f"{top1:.2f}" + (f" ± {std:.2f}, {len(self.runs)} seeds" if std is not None else "")

    @property
    def bits(self) -> str:
        w_bits, a_bits = self.runs[0]["w_bits"], self.runs[0]["a_bits"]
        return "32" if (w_bits, a_bits) == ("32", "32") else f"W{w_bits}A{a_bits}"


def gather_variants(rows: list[dict[str, str]]) -> list[Variant]:
    """Variants, most bits of inputs and then of weights first, and of those the most accurate.

    Of several rows of one run the last counts. A name that ends in ``-seed1`` is a repeat of the one without.
    """
    latest = {(row["name"], row["task"]): row for row in rows}
    names = dict.fromkeys(SEED.sub("", row["name"]) for row in rows if row["task"] in MADE)
    found = [
        Variant(
            name,
            [row for (own, task), row in latest.items() if task in MADE and SEED.sub("", own) == name],
            latest.get((name, "bench")),
        )
        for name in names
    ]
    return sorted(found, key=_rank)


def _rank(variant: Variant) -> tuple[float, ...]:
    w_bits, a_bits, top1 = (variant.mean(column) or 0 for column in ("w_bits", "a_bits", "top1"))
    return -a_bits, -w_bits, -top1


def summary_of(row: dict[str, str]) -> RunSummary | None:
    """A CSV row as a run's summary; ``None`` for one that measures again what another row already says."""
    known = {field.name for field in fields(RunSummary)} - {"status", "layers", "widths"}  # a width has its own row
    if row["task"] != "train":
        known -= {"name"}  # which would tell a calibrated student apart from the same one before training
    numbers = {*NUMBERS, "w_bits", "a_bits", "epochs", "seed"}
    values = {name: _number(text) if name in numbers else text for name, text in row.items() if name in known and text}
    summary = RunSummary(**values)  # type: ignore[arg-type]
    if row["task"] != "evaluate" or summary.full_precision:
        return summary
    if row["notes"] != "calibrated only":
        return None
    return RunSummary(**values | {"ptq_top1": summary.top1, "top1": None})  # type: ignore[arg-type]


def _number(text: str) -> float | str:
    try:
        return int(text) if re.fullmatch(r"-?\d+", text) else float(text)
    except ValueError:
        return text


def with_notes(
    columns: Sequence[str], lines: Sequence[Sequence[str]], found: Sequence[Variant], *, figures: range
) -> str:
    """The table of the variants ``found``, and what it rests on: test images, seeds, and the mark of small changes."""
    images = {text for variant in found for run in variant.runs if (text := run.get("test_images"))}
    notes = [f"On {' or '.join(sorted(images, key=int))} test images."] if images else []
    notes += [SEVERAL_SEEDS if any(variant.std is not None for variant in found) else ONE_SEED]
    notes += [UNCERTAIN] if any(CHANGE.fullmatch(cell) for line in lines for cell in line) else []
    return markdown_table(columns, lines, figures=figures) + notes_below(notes)
