"""Tables of times, costs and images made: what is measured beside accuracy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from result_tables.markdown import figure, float_or_none, markdown_table

FULL = "full precision"

PEERS = "peers"
"""The experiment of the rows of ``scripts/bench_peers.py``."""


SETTING = ("batch=", "size=", "threads=", "bf16", "accumulated=")
"""Words of the notes that say what a step works on."""


def steps(rows: list[dict[str, str]]) -> str:
    """The times of ``scripts/bench_step.py``; of several measurements of one thing on one machine the last.

    Each process stands with the full precision that it measured, since its ratios are to that.
    """
    measured = [row for row in rows if row["task"] == "bench" and row["experiment"] != PEERS]
    what = ("experiment", "model", "w_bits", "a_bits", "case", "name", "mode", "hardware")
    kept = _latest((row for row in measured if row["case"] != FULL), what)
    processes = {(row["date"], row["mode"]) for row in kept}
    lines = []
    for row in measured:
        if row in kept or (row["case"] == FULL and (row["date"], row["mode"]) in processes):
            bits = {"32": "32", "": ""}.get(row["w_bits"], f"W{row['w_bits']}A{row['a_bits']}")
            step = row.get("name") or row["case"]
            lines.append((row["model"], bits, step, row["mode"], *_times(row), _setting(row), row["hardware"]))
    columns = ("Model", "Bits", "Step", "Mode", "ms", "Ratio", "Memory", "Setting", "Hardware")
    return markdown_table(columns, lines, figures=range(4, 7))


def peers(rows: list[dict[str, str]]) -> str:
    """The times of ``scripts/bench_peers.py``: whose step, and its ratio to compiled full precision, fastest first."""
    found = _latest((row for row in rows if row["experiment"] == PEERS), ("model", "name", "mode", "hardware"))
    lines = [
        (row["model"], row["name"] or row["case"], row["mode"], *_times(row), _setting(row), row["hardware"])
        for row in sorted(found, key=lambda row: (row["model"], float(row["ratio"] or 1)))
    ]
    columns = ("Model", "Step", "Mode", "ms", "Ratio", "Memory", "Setting", "Hardware")
    return markdown_table(columns, lines, figures=range(3, 6))


def phases(rows: list[dict[str, str]]) -> str:
    """The times of ``scripts/bench_phases.py`` in passes; the last of each phase, student and machine.

    Each process stands with the pass that it measured.
    """
    measured = [row for row in rows if row["task"] == "bench_phases"]
    what = ("model", "quantizer", "w_bits", "a_bits", "case", "hardware")
    kept = _latest((row for row in measured if row["case"] != FULL), what)
    processes = {row["date"] for row in kept}
    lines = []
    for row in measured:
        if row in kept or (row["case"] == FULL and row["date"] in processes):
            milliseconds, passes, _ = _times(row)
            bits = f"W{row['w_bits']}A{row['a_bits']}"
            lines.append((row["model"], bits, row["case"], milliseconds, passes or "1", _setting(row), row["hardware"]))
    return markdown_table(("Model", "Bits", "Phase", "ms", "Passes", "Setting", "Hardware"), lines, figures=range(3, 5))


def _latest(rows: Iterable[dict[str, str]], columns: Sequence[str]) -> list[dict[str, str]]:
    """Of the rows that agree in ``columns`` and in what a step works on the last."""
    return list({(_setting(row), *(row.get(name, "") for name in columns)): row for row in rows}.values())


def _setting(row: dict[str, str]) -> str:
    """What a step works on, of the notes: not how often it was measured."""
    notes = row["notes"] if "size=" in row["notes"] else row["notes"].replace(" ", " size=32 ", 1)  # all had it once
    return " ".join(word for word in notes.split() if word.startswith(SETTING))


def _times(row: dict[str, str]) -> tuple[str, str, str]:
    """Milliseconds, the ratio, and the ratio of what is kept for the backward."""
    of_time, of_memory = (f"{float(row[name]):.2f}" if row.get(name) else "" for name in ("ratio", "saved_ratio"))
    return f"{float(row['step_ms']):.1f}", of_time, of_memory


def synthetic(rows: list[dict[str, str]]) -> str:
    """One row for each kind of images that ``task=synthesize`` made: the last of each method, number and machine."""
    made = [row for row in rows if row["task"] == "synthesize" and row.get("s_per_1000_images")]
    lines = []
    for row in {(row["notes"], row["hardware"]): row for row in made}.values():
        figures = [f"{float(row[name]):.3g}" for name in ("statistics", "noise_statistics", "s_per_1000_images")]
        method, shown = row["notes"].partition(",")[0], f"{100 * float(row['as_labeled']):.0f}"
        lines.append((method, row["images"], *figures[:2], shown, figures[2], row["hardware"]))
    columns = ("Method", "Images", "Distance", "Of noise", "As labeled %", "s per 1,000", "Hardware")
    return markdown_table(columns, lines, figures=range(1, 6))


def integers(rows: list[dict[str, str]]) -> str:
    """One row a model: of the export and of the runtime's own quantization, layers in integers, and what is not."""
    lines = []
    for row in {row["model"]: row for row in rows}.values():
        cells = [row["model"]]
        for start in ("", "int8_"):
            macs = figure(float_or_none(row[f"{start}integer_macs"]), 100, ".1f")
            cells += [f"{row[f'{start}integer_layers']} of {row[f'{start}layers']}" if macs else row["reason"], macs]
            cells += [row[f"{start}in_float"]]
        lines.append(tuple(cells))
    columns = ("Model", "Export: layers", "MACs %", "In float", "Runtime's own: layers", "MACs %", "In float")
    return markdown_table(columns, lines, figures=range(1, 3))


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
    return markdown_table(columns, lines, figures=range(2, 9))


def published(rows: list[dict[str, str]]) -> str:
    """One row a point: what the cost model says, and what is published."""
    lines = []
    for row in {(row["model"], row["point"]): row for row in rows}.values():
        size = (f"{float(row['mb']):.2f}", row["published_mb"], f"{float(row['mb_error_percent']):+.1f}")
        bops = (f"{float(row['gbops']):.1f}", row["published_gbops"], f"{float(row['gbops_error_percent']):+.1f}")
        lines.append((row["model"], row["point"], *size, *bops))
    columns = ("Model", "Bits", "MB", "Published", "%", "G bit operations", "Published", "%")
    return markdown_table(columns, lines, figures=range(2, 8))


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
    return markdown_table(columns, lines, figures=range(3, 6))


def solving(rows: list[dict[str, str]]) -> str:
    """The times of ``scripts/bench_allocation.py``; the last of each network, search and machine."""
    lines = []
    for row in {(row["model"], row["case"], row["hardware"]): row for row in rows}.values():
        seconds, ratio = float(row["processor_s"]), float_or_none(row["score_ratio"])
        took = f"{seconds:.2f} s" if seconds > 1e-3 else f"{1e6 * seconds:.1f} us"
        lines.append((row["model"], row["layers"], row["case"], took, figure(ratio, 1, ".2f"), row["hardware"]))
    columns = ("Model", "Layers", "What", "Processor time", "Score, of uniform's", "Hardware")
    return markdown_table(columns, lines, figures=range(3, 5))
