"""Tables of trained and calibrated students."""

from __future__ import annotations

import math
import re

from qtrain.pipeline.summary import CALIBRATED, FLOAT
from qtrain.report.difference import UNCERTAIN, difference
from qtrain.report.seed_groups import order, seed_groups
from qtrain.report.table import LEFT, ONE_SEED, SEVERAL_SEEDS, closing_table, table_notes
from qtrain.report.teacher_gain import teacher_gains
from result_tables.markdown import figure, markdown_table, notes_below
from result_tables.variant import MADE, Variant, gather_variants, summary_of, with_notes


def students(rows: list[dict[str, str]]) -> str:
    """The closing table of all ``rows``, with how long and on what the models were trained.

    Raises ``ValueError`` where none of them is of a student: such rows have a table of another kind.
    """
    of_one = ("config_hash", "task", "w_bits", "a_bits")  # a student of many bits has a row of each width
    latest = {tuple(map(row.get, of_one)) if row["config_hash"] else id(row): row for row in rows}
    runs = [(summary, row) for row in latest.values() if (summary := summary_of(row)) is not None]
    if rows and not any(row["task"] in (*MADE, "evaluate") for row in rows):
        raise ValueError("none of the rows is of a student; say of which kind the table is")
    # Full precision and calibration are of no training: one row, whatever run they were measured in.
    found = [(o, "", "") for o in seed_groups(s for s, _ in runs) if o.key.way in (FLOAT, CALIBRATED)]
    for epochs, hardware in dict.fromkeys((row["epochs"], row["hardware"]) for _, row in runs):
        same = [summary for summary, row in runs if (row["epochs"], row["hardware"]) == (epochs, hardware)]
        found += [(o, epochs, hardware) for o in seed_groups(same) if o.key.way not in (FLOAT, CALIBRATED)]
    found.sort(key=lambda item: (order(item[0]), float(item[1] or 0), item[2]))
    outcomes = [outcome for outcome, _, _ in found]
    columns, cells = closing_table(outcomes)
    lines = [(*row, epochs, hardware) for row, (_, epochs, hardware) in zip(cells, found, strict=True)]
    made = markdown_table((*columns, "Epochs", "Hardware"), lines, figures=range(LEFT, len(columns) + 1))
    return made + notes_below(table_notes(outcomes))


def variants(rows: list[dict[str, str]]) -> str:
    """One row a variant: accuracy after training and before it, cost, and a step in units of full precision."""
    lines = []
    found = gather_variants(rows)
    for variant in found:
        calibrated, full = variant.mean("ptq_top1"), variant.bits == "32"
        lines.append(
            (
                variant.name.removesuffix(f"-{variant.bits.lower()}"),
                variant.bits,
                variant.accuracy,
                "" if calibrated is None else f"{calibrated:.2f}",
                figure(variant.mean("size_bytes"), 1e-3, ".1f"),
                figure(variant.mean("effective_bits"), 1.0, ".2f"),
                figure(variant.mean("bops"), 1e-9, ".3g"),
                "1.00" if full else figure(_step_ratio(variant.step), 1.0, ".2f"),
                _learning_rate(variant.runs[0]["notes"]),
            )
        )
    columns = ("Quantizer", "Bits", "Trained %", "Calibrated only %", "kB", "Bits/weight", "GBOPs", "Step", "Rate")
    return with_notes(columns, lines, found, figures=range(2, len(columns)))


def gains(rows: list[dict[str, str]]) -> str:
    """One row for each number of bits: students with and without teacher over the same seeds, and the gain."""
    lines = []
    for gain in teacher_gains(seed_groups(summary for row in rows if (summary := summary_of(row)) is not None)):
        found, sides = gain.difference, (gain.trained, gain.distilled)
        accuracies = [f"{side.top1:.2f} ± {side.std:.2f}" if side.seeds > 1 else f"{side.top1:.2f}" for side in sides]
        counts = (str(found.paired or ""), str(gain.distilled.images or ""))
        alone = "" if math.isnan(found.seed_error) else f"{found.seed_error:.2f}"
        lines.append((gain.distilled.key.bits, *accuracies, str(found), alone, *counts))
    columns = ("Bits", "Trained %", "Distilled %", "Gain", "Its error by seeds alone", "Seeds", "Test images")
    return markdown_table(columns, lines, figures=range(1, len(columns))) + notes_below([SEVERAL_SEEDS, UNCERTAIN])


def recipes(rows: list[dict[str, str]]) -> str:
    """One row a way of training, the most accurate first, and what it gains over ``none``: no teacher, one stage."""
    found = gather_variants(rows)
    plain = {variant.bits: variant for variant in found if variant.name.partition("-")[0] == "none"}
    lines = []
    for variant in found:
        other, run = plain.get(variant.bits), variant.runs[-1]
        gain = "" if other is None or other is variant else str(variant.against(other))
        last = run["epochs"], run["hardware"]
        lines.append((variant.name, variant.bits, run["distill"], variant.accuracy, gain, *last))
    columns = ("Run", "Bits", "Teacher's terms", "Top-1 %", "Against none", "Epochs", "Hardware")
    return with_notes(columns, lines, found, figures=range(3, 6))


def probes(rows: list[dict[str, str]]) -> str:
    """One row for each run of a recipe: accuracy before and after so short a training, and what it took."""
    latest = {f"{row['experiment']} {row['name']}".strip(): row for row in rows if row["task"] == "train"}
    lines = []
    for name, run in sorted(latest.items()):
        of_run = Variant(name, [run], None)
        accuracies = (figure(of_run.mean(column), 1.0, ".2f") for column in ("ptq_top1", "top1", "fp_top1"))
        minutes = figure(of_run.mean("wall_s"), 1 / 60, ".1f")
        lines.append((name, of_run.bits, run["distill"], *accuracies, minutes, run["hardware"]))
    columns = ("Run", "Bits", "Teacher's terms", "Calibrated %", "Trained %", "Full precision %", "Minutes", "Hardware")
    images = sorted({run["test_images"] for run in latest.values()}, key=int)
    notes = [f"On {' or '.join(images)} test images.", ONE_SEED] if images else []
    return markdown_table(columns, lines, figures=range(3, 7)) + notes_below(notes)


def drops(rows: list[dict[str, str]]) -> str:
    """One row a variant, trained or not: accuracy, what that is less than full precision, and the time it took."""
    lines = []
    found = gather_variants(rows)
    for variant in found:
        run = variant.runs[-1]
        change = str(difference(variant.by_seed("top1"), variant.by_seed("fp_top1"), images=variant.images))
        made = "calibrated" if run["task"] == "calibrate" else f"trained, {run['epochs']} epochs"
        size, minutes = figure(variant.mean("size_bytes"), 1e-3, ".1f"), figure(variant.mean("wall_s"), 1 / 60, ".1f")
        lines.append((variant.name, variant.bits, made, variant.accuracy, change, size, minutes, run["hardware"]))
    columns = ("Run", "Bits", "Student", "Top-1 %", "Change", "kB", "Minutes", "Hardware")
    return with_notes(columns, lines, found, figures=range(3, 7))


def widths(rows: list[dict[str, str]]) -> str:
    """The accuracy of one model of many bits at each width, against a student of that width alone; seeds averaged.

    Rows belong together by data, model, epochs and test images. Of several rows of one run and width the last counts.
    """
    latest = {(row["config_hash"], row["w_bits"], row["a_bits"]): row for row in rows if row["task"] == "train"}
    groups: dict[tuple[str, ...], dict[bool, list[dict[str, str]]]] = {}
    for row in latest.values():
        key = tuple(row[name] for name in ("dataset", "model", "epochs", "test_images", "w_bits", "a_bits"))
        groups.setdefault(key, {True: [], False: []})[bool(row.get("widths"))].append(row)
    lines, several = [], False
    for (dataset, model, epochs, images, w_bits, a_bits), sides in groups.items():
        one, alone = (Variant("", sides[many], None) for many in (True, False))
        if not one.by_seed("top1") or not alone.by_seed("top1"):
            continue
        several = several or len(one.runs) > 1
        change = str(one.against(alone))
        lines.append((dataset, model, f"W{w_bits}A{a_bits}", one.accuracy, alone.accuracy, change, images, epochs))
    columns = ("Data", "Model", "Bits", "One model %", "Alone %", "Difference", "Images", "Epochs")
    return markdown_table(columns, lines, figures=range(3, len(columns))) + notes_below(
        [SEVERAL_SEEDS if several else ONE_SEED, UNCERTAIN]
    )


def _step_ratio(step: dict[str, str] | None) -> float | None:
    return float(step["ratio"]) if step is not None and step.get("ratio") else None


def _learning_rate(notes: str) -> str:
    match = re.search(r"lr=([\d.e-]+)", notes)
    return match[1] if match else ""
