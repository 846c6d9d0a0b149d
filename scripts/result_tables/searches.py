"""Tables of searches: fronts of sweeps, allocations of bits, and the scores that they read."""

from __future__ import annotations

import math

from result_tables.markdown import figure, markdown_table, notes_below
from result_tables.variant import Variant, with_notes

ORDERS = ("spearman_kl", "spearman_errors")


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
    return markdown_table(columns, lines, figures=range(2, 6))


def _point(row: dict[str, str]) -> str:
    """The number on the front of the row's sweep, which is called by its experiment, and its own name if it has one."""
    experiment = row["experiment"].rpartition("/")[2]
    named = [experiment, *([row["sweep"].removeprefix("sweep-")] if row["sweep"] != "sweep" else []), row["point"]]
    return " ".join(filter(None, named)) if row["point"] else "start"


def _ahead(one: dict[str, str], other: dict[str, str]) -> bool:
    losses = [(-float(row["top1"]), float(row["size_bytes"]), float(row["bops"])) for row in (one, other)]
    return losses[0] != losses[1] and all(a <= b for a, b in zip(*losses, strict=True))


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
            figure(variant.mean("size_bytes"), 1e-3, ".1f"),
            figure(variant.mean("effective_bits"), 1.0, ".2f"),
            figure(variant.mean("bops"), 1e-9, ".3g"),
        )
        lines.append((budget, allocator, way, variant.accuracy, gain, *costs, variant.runs[-1]["hardware"]))
    columns = ("Budget", "Bits by", "Student", "Top-1 %", "Against uniform", "kB", "Bits/weight", "GBOPs", "Hardware")
    return with_notes(columns, lines, list(found.values()), figures=range(3, 8))


def agreement(rows: list[dict[str, str]]) -> str:
    """One row an allocation: on how many pictures its student predicts what full precision does, best first."""
    latest = {(row["allocator"], row["bias"]): row for row in rows}
    lines = []
    for row in sorted(latest.values(), key=lambda row: -float(row["agreement"])):
        share, images = float(row["agreement"]) / 100, int(row["judged_images"])
        error = 100 * math.sqrt(share * (1 - share) / images)
        lines.append((
            row["allocator"], row["bias"], f"{100 * share:.1f} ({error:.1f})", f"{float(row['divergence']):.2f}",
            str(images), figure(float(row["size_bytes"]), 1e-3, ".1f"), f"{float(row['effective_bits']):.2f}",
            row["hardware"],
        ))  # fmt: skip
    columns = ("Bits by", "Biases", "Agreement %", "Divergence", "Pictures", "kB", "Bits/weight", "Hardware")
    return markdown_table(columns, lines, figures=range(2, 7))


def latencies(rows: list[dict[str, str]]) -> str:
    """One row a runtime and budget of latency: what was asked, predicted and measured, and what it is worth."""
    lines = []
    for row in {(row["runtime"], row["budget"]): row for row in rows}.values():
        told = f"{float(row['predicted_us']):.0f}"
        if row["notes"]:
            least = f"{100 * float(row['predicted_us']) / float(row['budget_us']) * _share(row['budget']):.0f} %"
            lines.append((row["runtime"], row["budget"], f"{row['notes']}; least: {least}", *[""] * 4, row["hardware"]))
            continue
        of_int8 = [f"{100 * float(row[name]):.0f}" for name in ("of_int8", "of_int8_low", "of_int8_high")]
        measured = f"{of_int8[0]} % ({of_int8[1]} to {of_int8[2]})"
        in_float = f"{row['float_weights']} and {row['float_inputs']} of {row['layers']}"
        times = (told, f"{float(row['measured_us']):.0f}")
        lines.append((row["runtime"], row["budget"], measured, *times, in_float, row["top1"], row["hardware"]))
    columns = ("Runtime", "Budget", "Measured", "Table us", "Measured us", "In floating point", "Top-1 %", "Hardware")
    return markdown_table(columns, lines, figures=range(3, 7))


def _share(percent: str) -> float:
    return float(percent.removesuffix("%")) / 100


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
    made = markdown_table(columns, lines, figures=range(2, len(columns)))
    seen = sorted({row["measured_images"] for found in ordered.values() for row in found.values()}, key=int)
    made += notes_below([f"Measured on {' or '.join(seen)} images."] if seen else [])
    large = [
        (row["model"], row["score"], f"{float(row['peak_bytes']) / 2**30:.1f}", f"{float(row['passes']):.1f}",
         f"{float(row['cpu_s']):.0f}", row["images"], row["notes"])
        for row in latest.values() if row.get("peak_bytes")
    ]  # fmt: skip
    columns = ("Model", "Score", "Most memory, GiB", "Passes", "Processor, s", "Images", "How")
    return made + ("\n" + markdown_table(columns, large, figures=range(2, 6)) if large else "")


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
    made = markdown_table(columns, lines, figures=range(3, len(columns)))
    several = sorted({(row["allocations"], row["measured_images"]) for row in latest.values()})
    return made + notes_below([f"{count} allocations, {images} images." for count, images in several])
