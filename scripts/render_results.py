"""Writes the tables of README and docs from the rows in ``results/``, so that no number is ever typed.

    python scripts/render_results.py             # README.md, docs/*.md and qtrain/report/recorded.csv, in place
    python scripts/render_results.py --check     # exit code 1 where a table is not what its rows say

A table stands between ``<!-- results:NAME -->`` and ``<!-- /results -->`` and is made of ``results/NAME.csv``. With
``<!-- results:NAME variants -->`` it has a row for each variant of an experiment; ``recipes`` in that place holds them
against the variant ``none``, ``drops`` against full precision, ``gains`` distilled students against others;
``synthetic`` has the images of ``task=synthesize``,
``integers`` the layers that a runtime computes in integers, ``speed`` the times of exported files, ``scores`` how
scores of sensitivity order layers, ``orders`` how they order whole allocations, ``agreement`` on how many pictures
their students predict what full precision does, ``widths`` one model of many bits against students of one width,
``published`` costs beside those of a paper, ``latency`` a table's times beside measured ones. Of several rows of one
configuration the last counts; seeds are averaged. A file that is not there yet gives no table.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

from qtrain.pipeline.results import read_results
from qtrain.pipeline.summary import CALIBRATED, FLOAT, NUMBERS, RIGHT, RunSummary
from qtrain.report.difference import UNCERTAIN, Accuracy, Difference, difference
from qtrain.report.seed_groups import order, seed_groups
from qtrain.report.table import LEFT, ONE_SEED, SEVERAL_SEEDS, closing_table, table_notes
from qtrain.report.teacher_gain import RECORDED, recorded_of, recorded_text, teacher_gains

ROOT = Path(__file__).resolve().parent.parent
KINDS = (
    "variants|gains|recipes|drops|synthetic|front|integers|speed|allocations|agreement|scores|orders|widths|published|"
    "latency"
)
BLOCK = re.compile(
    rf"(<!-- results:(?P<name>[\w-]+)(?: (?P<kind>{KINDS}))? -->\n)(?P<table>.*?)(<!-- /results -->)", re.DOTALL
)
SEED = re.compile(r"-seed\d+$")
CHANGE = re.compile(r"[+-][\d.]+ \([\d.]+\)( ~)?")
"""A difference with its standard error, as tables show it."""
ORDERS = ("spearman_kl", "spearman_errors")
WITH_GAINS = ("quickstart",)
"""Experiments whose gain by a teacher the package shows; their rows are in the file of that name."""
MADE = ("train", "calibrate")
"""Tasks that leave a student."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 where a table is out of date")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of the CSV files")
    parser.add_argument("files", nargs="*", type=Path, help="Markdown files; default: README.md and docs/*.md")
    options = parser.parse_args(arguments)
    stale = []
    if not options.files and (text := recorded(options.results)) != RECORDED.read_text(encoding="utf-8"):
        stale.append(RECORDED)
        if not options.check:
            RECORDED.write_text(text, encoding="utf-8")
            print(f"rendered {RECORDED}")
    for path in options.files or [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        before = path.read_text(encoding="utf-8")
        after = render(before, options.results)
        if after != before:
            stale.append(path)
            if not options.check:
                path.write_text(after, encoding="utf-8")
                print(f"rendered {path}")
    if options.check and stale:
        names = ", ".join(str(path) for path in stale)
        print(f"{names}: tables differ from results/; run python scripts/render_results.py", file=sys.stderr)
    return int(options.check and bool(stale))


def recorded(results: Path) -> str:
    """The content of the file with the gains that the package shows: of each experiment with rows of several seeds."""
    found = []
    for name in WITH_GAINS:
        rows = read_results(file) if (file := results / f"{name}.csv").is_file() else []
        runs = [summary for row in rows if (summary := summary_of(row)) is not None]
        found += recorded_of(name, runs, (row["commit"] for row in rows)) if runs else []
    return recorded_text(found)


def render(text: str, results: Path) -> str:
    """``text`` with every table made anew from the CSV files in ``results``."""
    opened, whole = text.count("<!-- results:"), len(BLOCK.findall(text))
    if opened != whole:
        raise ValueError(
            f"render_results: {opened} tables are opened and {whole} are whole; "
            "write <!-- results:NAME --> and <!-- /results --> on lines of their own"
        )

    def table(match: re.Match[str]) -> str:
        path = results / f"{match['name']}.csv"
        kinds = {"variants": variants, "recipes": recipes, "drops": drops, "synthetic": synthetic, "front": front}
        more = {"integers": integers, "speed": speed, "allocations": allocations, "scores": scores, "widths": widths}
        more |= {"published": published, "latency": latency, "orders": orders, "gains": gains, "agreement": agreement}
        made = (kinds | more).get(match["kind"], markdown)
        return match[1] + (made(read_results(path)) if path.is_file() else "") + match[5]

    return BLOCK.sub(table, text)


def markdown(rows: list[dict[str, str]]) -> str:
    """The closing table of all ``rows``, with how long and on what the models were trained; of a benchmark, its own."""
    if rows and all(row["task"] in ("bench", "bench_startup") for row in rows):
        return bench([row for row in rows if row["task"] == "bench"])
    latest = {(row["config_hash"], row["task"]) if row["config_hash"] else id(row): row for row in rows}
    runs = [(summary, row) for row in latest.values() if (summary := summary_of(row)) is not None]
    # Full precision and calibration are of no training: one row, whatever run they were measured in.
    found = [(o, "", "") for o in seed_groups(s for s, _ in runs) if o.key.way in (FLOAT, CALIBRATED)]
    for epochs, hardware in dict.fromkeys((row["epochs"], row["hardware"]) for _, row in runs):
        same = [summary for summary, row in runs if (row["epochs"], row["hardware"]) == (epochs, hardware)]
        found += [(o, epochs, hardware) for o in seed_groups(same) if o.key.way not in (FLOAT, CALIBRATED)]
    found.sort(key=lambda item: (order(item[0]), float(item[1] or 0), item[2]))
    outcomes = [outcome for outcome, _, _ in found]
    columns, cells = closing_table(outcomes)
    lines = [(*row, epochs, hardware) for row, (_, epochs, hardware) in zip(cells, found, strict=True)]
    made = _markdown_table((*columns, "Epochs", "Hardware"), lines, figures=range(LEFT, len(columns) + 1))
    return made + _notes(table_notes(outcomes))


def bench(rows: list[dict[str, str]]) -> str:
    """The times of ``scripts/bench_step.py``; of several measurements of one thing on one machine the last.

    Each experiment has its own full precision, since a ratio is to that of the same process.
    """
    what = ("experiment", "model", "w_bits", "a_bits", "case", "name", "mode", "hardware", "notes")
    latest = {tuple(row.get(name, "") for name in what): row for row in rows}
    lines = []
    for row in latest.values():
        bits = {"32": "32", "": ""}.get(row["w_bits"], f"W{row['w_bits']}A{row['a_bits']}")
        ratios = [f"{float(row[name]):.2f}" if row.get(name) else "" for name in ("ratio", "saved_ratio")]
        times = (f"{float(row['step_ms']):.1f}", *ratios)
        step = row.get("name") or row["case"]
        lines.append((row["model"], bits, step, row["mode"], *times, row["notes"], row["hardware"]))
    columns = ("Model", "Bits", "Step", "Mode", "ms", "Ratio", "Memory", "Setting", "Hardware")
    return _markdown_table(columns, lines, figures=range(4, 7))


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
                _figure(variant.mean("size_bytes"), 1e-3, ".1f"),
                _figure(variant.mean("effective_bits"), 1.0, ".2f"),
                _figure(variant.mean("bops"), 1e-9, ".3g"),
                "1.00" if full else _figure(_number_or_none(variant.step), 1.0, ".2f"),
                _learning_rate(variant.runs[0]["notes"]),
            )
        )
    columns = ("Quantizer", "Bits", "Trained %", "Calibrated only %", "kB", "Bits/weight", "GBOPs", "Step", "Rate")
    return _with_notes(columns, lines, found, figures=range(2, len(columns)))


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
    return _markdown_table(columns, lines, figures=range(1, len(columns))) + _notes([SEVERAL_SEEDS, UNCERTAIN])


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
    return _with_notes(columns, lines, found, figures=range(3, 6))


def front(rows: list[dict[str, str]]) -> str:
    """The models of the fronts of sweeps and of their starts, smallest first; of the latter, what on a front is better.

    Better: at least as accurate on test images, no larger and with no more bit operations, and ahead in one of them. A
    model that several sweeps started with has one row.
    """
    models: dict[str, dict[str, str]] = {}
    for row in rows:
        if row["task"] == "sweep" and row["size_bytes"] and (row["point"] or row["config_hash"] not in models):
            models[row["config_hash"]] = row
    lines = []
    for row in sorted(models.values(), key=lambda row: (float(row["size_bytes"]), float(row["top1"]))):
        better = [_point(other) for other in models.values() if other["point"] and _ahead(other, row)]
        said = (", ".join(better) or "none") if row["start"] == "true" else ""
        cells = (_point(row), row["bits"], f"{float(row['size_bytes']) / 1e3:.1f}", f"{float(row['bops']) / 1e9:.3g}")
        lines.append((*cells, f"{float(row['val_top1']):.2f}", f"{float(row['top1']):.2f}", said, row["knobs"]))
    columns = ("Point", "Bits", "kB", "GBOPs", "Validation %", "Test %", "Beaten by", "Knobs")
    return _markdown_table(columns, lines, figures=range(2, 6))


def _point(row: dict[str, str]) -> str:
    """The number on the front of the row's sweep, which is called by its experiment, and its own name if it has one."""
    experiment = row["experiment"].rpartition("/")[2]
    named = [experiment, *([row["sweep"].removeprefix("sweep-")] if row["sweep"] != "sweep" else []), row["point"]]
    return " ".join(filter(None, named)) if row["point"] else "start"


def _ahead(one: dict[str, str], other: dict[str, str]) -> bool:
    losses = [(-float(row["top1"]), float(row["size_bytes"]), float(row["bops"])) for row in (one, other)]
    return losses[0] != losses[1] and all(a <= b for a, b in zip(*losses, strict=True))


def drops(rows: list[dict[str, str]]) -> str:
    """One row a variant, trained or not: accuracy, what that is less than full precision, and the time it took."""
    lines = []
    found = gather_variants(rows)
    for variant in found:
        run = variant.runs[-1]
        change = str(difference(variant.by_seed("top1"), variant.by_seed("fp_top1"), images=variant.images))
        made = "calibrated" if run["task"] == "calibrate" else f"trained, {run['epochs']} epochs"
        size, minutes = _figure(variant.mean("size_bytes"), 1e-3, ".1f"), _figure(variant.mean("wall_s"), 1 / 60, ".1f")
        lines.append((variant.name, variant.bits, made, variant.accuracy, change, size, minutes, run["hardware"]))
    columns = ("Run", "Bits", "Student", "Top-1 %", "Change", "kB", "Minutes", "Hardware")
    return _with_notes(columns, lines, found, figures=range(3, 7))


def synthetic(rows: list[dict[str, str]]) -> str:
    """One row for each kind of images that ``task=synthesize`` made: the last of each method, number and machine."""
    made = [row for row in rows if row["task"] == "synthesize" and row.get("s_per_1000_images")]
    lines = []
    for row in {(row["notes"], row["hardware"]): row for row in made}.values():
        figures = [f"{float(row[name]):.3g}" for name in ("statistics", "noise_statistics", "s_per_1000_images")]
        method, shown = row["notes"].partition(",")[0], f"{100 * float(row['as_labeled']):.0f}"
        lines.append((method, row["images"], *figures[:2], shown, figures[2], row["hardware"]))
    columns = ("Method", "Images", "Distance", "Of noise", "As labeled %", "s per 1,000", "Hardware")
    return _markdown_table(columns, lines, figures=range(1, 6))


def allocations(rows: list[dict[str, str]]) -> str:
    """One row a budget, a way to make the student and an allocator; and what it gains over the best uniform bits."""
    groups: dict[tuple[str, str, str], dict[str, dict[str, str]]] = {}
    for row in rows:
        groups.setdefault((row["budget"], row["way"], row["allocator"]), {})[row["seed"]] = row  # the last of each seed
    found = {key: Variant(key[2], list(seeds.values()), None) for key, seeds in groups.items()}
    uniform = [key for key in found if key[2].startswith("uniform") and not key[2].endswith("no-ends")]
    lines = []
    for key in sorted(found, key=lambda key: (*key[:2], -(found[key].mean("top1") or 0.0))):
        budget, way, allocator = key
        variant = found[key]
        others = [found[other] for other in uniform if other[:2] == (budget, way) and other != key]
        best = max(others, key=lambda other: other.mean("top1") or 0.0, default=None)
        gain = ""
        if best is not None and not allocator.startswith("uniform"):
            gain = str(variant.against(best))
        costs = (
            _figure(variant.mean("size_bytes"), 1e-3, ".1f"),
            _figure(variant.mean("effective_bits"), 1.0, ".2f"),
            _figure(variant.mean("bops"), 1e-9, ".3g"),
        )
        lines.append((budget, allocator, way, variant.accuracy, gain, *costs, variant.runs[-1]["hardware"]))
    columns = ("Budget", "Bits by", "Student", "Top-1 %", "Against uniform", "kB", "Bits/weight", "GBOPs", "Hardware")
    return _with_notes(columns, lines, list(found.values()), figures=range(3, 8))


def agreement(rows: list[dict[str, str]]) -> str:
    """One row an allocation: on how many pictures its student predicts what full precision does, best first."""
    latest = {(row["allocator"], row["bias"]): row for row in rows}
    lines = []
    for row in sorted(latest.values(), key=lambda row: -float(row["agreement"])):
        share, images = float(row["agreement"]) / 100, int(row["judged_images"])
        error = 100 * math.sqrt(share * (1 - share) / images)
        lines.append((
            row["allocator"], row["bias"], f"{100 * share:.1f} ({error:.1f})", f"{float(row['divergence']):.2f}",
            str(images), _figure(float(row["size_bytes"]), 1e-3, ".1f"), f"{float(row['effective_bits']):.2f}",
            row["hardware"],
        ))  # fmt: skip
    columns = ("Bits by", "Biases", "Agreement %", "Divergence", "Pictures", "kB", "Bits/weight", "Hardware")
    return _markdown_table(columns, lines, figures=range(2, 7))


def scores(rows: list[dict[str, str]]) -> str:
    """How each score orders layers, one row for weights and one for inputs; then what large networks took."""
    latest = {(row["model"], row["score"], row["role"], row["bits"]): row for row in rows}
    ordered: dict[tuple[str, str], dict[str, dict[str, str]]] = {}
    for row in latest.values():
        if row["spearman_kl"]:
            ordered.setdefault((row["score"], row["role"]), {})[row["bits"]] = row
    widths = list(dict.fromkeys(bits for found in ordered.values() for bits in found if bits != "all"))
    lines = []
    for (score, role), found in ordered.items():
        last = found["all"]
        at = [f"{float(found[bits]['spearman_kl']):.2f}" for bits in (*widths, "all")]
        more = (f"{float(last['spearman_loss']):.2f}", f"{float(last['passes']):.1f}", last["images"])
        lines.append((score, role, *at, *more))
    columns = ("Score", "Of", *(f"{bits} bits" for bits in widths), "All", "All, loss", "Passes", "Images")
    made = _markdown_table(columns, lines, figures=range(2, len(columns)))
    seen = sorted({row["measured_images"] for found in ordered.values() for row in found.values()}, key=int)
    made += _notes([f"Measured on {' or '.join(seen)} images."] if seen else [])
    large = [
        (row["model"], row["score"], f"{float(row['peak_bytes']) / 2**30:.1f}", f"{float(row['passes']):.1f}",
         f"{float(row['cpu_s']):.0f}", row["images"], row["notes"])
        for row in latest.values() if row.get("peak_bytes")
    ]  # fmt: skip
    columns = ("Model", "Score", "Most memory, GiB", "Passes", "Processor, s", "Images", "How")
    return made + ("\n" + _markdown_table(columns, large, figures=range(2, 6)) if large else "")


def orders(rows: list[dict[str, str]]) -> str:
    """How each score orders allocations of one cost, and what its best one gives beside uniform bits."""
    latest = {tuple(row[name] for name in ("budget", "way", "score", "weight_error")): row for row in rows}

    def of(row: dict[str, str], whose: str) -> str:
        return f"{float(row[f'{whose}_kl']):.2f}, {100 * float(row[f'{whose}_errors']):.1f}"

    lines = [
        (
            *key,
            *(f"{float(row[name]):.2f}" if row[name] else "" for name in ORDERS),
            of(row, "best"),
            of(row, "uniform"),
        )
        for key, row in latest.items()
    ]
    columns = ("Cost of", "Measured", "Score", "Weights' part", "Order, nats", "Order, errors", "Its best", "Uniform")
    made = _markdown_table(columns, lines, figures=range(3, len(columns)))
    several = sorted({(row["allocations"], row["measured_images"]) for row in latest.values()})
    return made + _notes([f"{count} allocations, {images} images." for count, images in several])


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
    return _markdown_table(columns, lines, figures=range(3, len(columns))) + _notes(
        [SEVERAL_SEEDS if several else ONE_SEED, UNCERTAIN]
    )


def integers(rows: list[dict[str, str]]) -> str:
    """One row a model: of the export and of the runtime's own quantization, layers in integers, and what is not."""
    lines = []
    for row in {row["model"]: row for row in rows}.values():
        cells = [row["model"]]
        for start in ("", "int8_"):
            macs = _figure(_float_or_none(row[f"{start}integer_macs"]), 100, ".1f")
            cells += [f"{row[f'{start}integer_layers']} of {row[f'{start}layers']}" if macs else row["reason"], macs]
            cells += [row[f"{start}in_float"]]
        lines.append(tuple(cells))
    columns = ("Model", "Export: layers", "MACs %", "In float", "Runtime's own: layers", "MACs %", "In float")
    return _markdown_table(columns, lines, figures=range(1, 3))


def speed(rows: list[dict[str, str]]) -> str:
    """One row a model and number of images at a time; the last of each. Ratios have their quartiles."""
    lines = []
    for row in {(row["model"], row["w_bits"], row["batch"], row["threads"]): row for row in rows}.values():
        times = [f"{float(row[name]):.2f}" for name in ("ms", "fp_ms", "int8_ms")]
        ratios = [
            f"{float(row[name]):.2f} ({float(row[f'{name}_low']):.2f} to {float(row[f'{name}_high']):.2f})"
            for name in ("of_fp", "of_int8")
        ]
        bits = f"W{row['w_bits']}A{row['a_bits']}"
        lines.append((row["model"], bits, row["batch"], *times, *ratios, row["rounds"], row["hardware"]))
    columns = ("Model", "Bits", "Batch", "Export ms", "Float ms", "Runtime's INT8 ms", "Of float", "Of INT8", "Rounds",
               "Hardware")  # fmt: skip
    return _markdown_table(columns, lines, figures=range(2, 9))


def published(rows: list[dict[str, str]]) -> str:
    """One row a point: what the cost model says, and what is published."""
    lines = []
    for row in {(row["model"], row["point"]): row for row in rows}.values():
        size = (f"{float(row['mb']):.2f}", row["published_mb"], f"{float(row['mb_error_percent']):+.1f}")
        bops = (f"{float(row['gbops']):.1f}", row["published_gbops"], f"{float(row['gbops_error_percent']):+.1f}")
        lines.append((row["model"], row["point"], *size, *bops))
    columns = ("Model", "Bits", "MB", "Published", "%", "G bit operations", "Published", "%")
    return _markdown_table(columns, lines, figures=range(2, 8))


def latency(rows: list[dict[str, str]]) -> str:
    """One row a network, runtime and number of bits; the last of each."""
    lines = []
    for row in {(row["model"], row["runtime"], row["w_bits"]): row for row in rows}.values():
        spread = f"{float(row['measured_us']):.0f} ({float(row['measured_us_low']):.0f} to "
        spread += f"{float(row['measured_us_high']):.0f})"
        predicted = (f"{float(row['predicted_us']):.0f}", f"{float(row['error_percent']):+.1f}")
        bits = f"W{row['w_bits']}A{row['a_bits']}"
        lines.append((row["model"], row["runtime"], bits, spread, *predicted, row["notes"], row["hardware"]))
    columns = ("Model", "Runtime", "Bits", "Measured us", "Table us", "%", "Notes", "Hardware")
    return _markdown_table(columns, lines, figures=range(3, 6))


def _float_or_none(text: str) -> float | None:
    return float(text) if text else None


def _number_or_none(step: dict[str, str] | None) -> float | None:
    return float(step["ratio"]) if step is not None and step.get("ratio") else None


def _figure(value: float | None, unit: float, form: str) -> str:
    return "" if value is None else format(value * unit, form)


def _learning_rate(notes: str) -> str:
    match = re.search(r"lr=([\d.e-]+)", notes)
    return match[1] if match else ""


def summary_of(row: dict[str, str]) -> RunSummary | None:
    """A CSV row as a run's summary; ``None`` for one that measures again what another row already says."""
    known = {field.name for field in fields(RunSummary)} - {"status", "layers"}
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


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, figures: range) -> str:
    """``figures`` are the columns of numbers, which are aligned to the right."""
    rule = ["---:" if i in figures else "---" for i in range(len(columns))]
    lines = [columns, rule, *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _with_notes(
    columns: Sequence[str], lines: Sequence[Sequence[str]], found: Sequence[Variant], *, figures: range
) -> str:
    """The table of the variants ``found``, and what it rests on: test images, seeds, and the mark of small changes."""
    images = {text for variant in found for run in variant.runs if (text := run.get("test_images"))}
    notes = [f"On {' or '.join(sorted(images, key=int))} test images."] if images else []
    notes += [SEVERAL_SEEDS if any(variant.std is not None for variant in found) else ONE_SEED]
    notes += [UNCERTAIN] if any(CHANGE.fullmatch(cell) for line in lines for cell in line) else []
    return _markdown_table(columns, lines, figures=figures) + _notes(notes)


def _notes(notes: Sequence[str]) -> str:
    """A paragraph below a table."""
    return f"\n{' '.join(notes)}\n" if notes else ""


if __name__ == "__main__":
    sys.exit(main())
