"""The task that shows all runs below a folder on one page.

``report.html`` needs nothing beside it: pictures, style and the few lines of script that sort a table are inside, so
that it can be sent around. It is made from ``summary.json`` and ``metrics.jsonl`` alone. A run that did not finish, or
whose files are damaged, is listed with the reason.
"""

from __future__ import annotations

import base64
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtrain.cost.count import OUTSIDE_LAYERS
from qtrain.data.image_grid import PICTURE
from qtrain.pipeline.summary import Run, RunSummary, gather
from qtrain.report import curves
from qtrain.report.canvas import DARK, LIGHT
from qtrain.report.html import Cell, number, render, word
from qtrain.report.live_table import print_front
from qtrain.report.run_plots import BIT_OPERATIONS, COMPRESSION, CostAxis, accuracy_plot
from qtrain.report.sweep_page import write_sweep_report
from qtrain.report.table import COLUMNS, Outcome, outcomes, print_summary, size_text, table_rows
from qtrain.settings.run_files import METRICS
from qtrain.settings.run_settings import RunSettings
from qtrain.spec import FULL_PRECISION
from qtrain.sweep.sweep_results import is_sweep, read_sweep
from qtrain.utils.atomic_write import write_text
from qtrain.utils.json_lines import read_metrics

log = logging.getLogger(__name__)

REPORT = "report.html"
PLOTS = {"accuracy_vs_compression.png": COMPRESSION, "accuracy_vs_bops.png": BIT_OPERATIONS}


@dataclass(frozen=True)
class Section:
    """What the page shows of one run below the tables; ``picture`` is a PNG of the images that it imagined."""

    anchor: str
    title: str
    run: RunSummary
    charts: list[curves.Chart]
    damaged_lines: int
    layers: list[list[Cell]]
    picture: str | None


def run(settings: RunSettings) -> dict[str, Any]:
    """Write the report of ``settings.report.folder`` into that folder; returns its path and how many runs it shows.

    The folder of a sweep gets the page of the sweep.
    """
    folder = Path(settings.report.folder)
    if is_sweep(folder):
        trials = read_sweep(folder)
        print_front(trials.trials, trials.objectives, space=trials.space)
        sweep_page = write_sweep_report(folder)
        print(f"report: {sweep_page}")
        return {"report": str(sweep_page), "trials": len(trials.trials), "front": len(trials.front)}
    page, finished, unfinished = write_report(folder)
    print_summary(folder)
    print(f"report: {page}")
    return {"report": str(page), "runs": finished, "unfinished": unfinished}


def write_report(folder: Path) -> tuple[Path, int, int]:
    """The page and its two plots in ``folder``; returns the page's path, the runs shown, and the runs only listed.

    Raises ``FileNotFoundError`` where there is no such folder or no run below it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"report.folder: there is no folder {folder}; give the one that holds the runs")
    runs, problems = gather(folder)
    if not runs and not problems:
        raise FileNotFoundError(f"report.folder: no run below {folder}; train one first, or give another folder")
    rows = outcomes(run.summary for run in runs)
    plots = [_plot(folder / name, rows, axis) for name, axis in PLOTS.items()] if rows else []
    sections = [_section(number, run, folder) for number, run in enumerate(runs)]
    page = render(
        "report.html.j2",
        title=folder.resolve().name,
        plots=plots,
        columns=COLUMNS,
        closing=table_rows(rows),
        run_columns=list(RUN_COLUMNS),
        runs=list(zip(sections, [_run_cells(run.summary) for run in runs], strict=True)),
        layer_columns=(*LAYER_COLUMNS, *HEALTH_COLUMNS),
        problems=[(_relative(problem.folder, folder), problem.reason) for problem in problems],
        size=curves,
    )
    write_text(folder / REPORT, page)
    return folder / REPORT, len(runs), len(problems)


def _plot(path: Path, rows: list[Outcome], axis: CostAxis) -> dict[str, str]:
    """Write the PNG, and give it to the page once for each of its two themes."""
    light, dark = accuracy_plot(rows, axis, LIGHT), accuracy_plot(rows, axis, DARK)
    path.write_bytes(light)
    encoded = {name: base64.b64encode(png).decode() for name, png in (("light", light), ("dark", dark))}
    return {"name": path.name, "text": f"Top-1 accuracy against {axis.label}", **encoded}


def _section(number: int, run: Run, folder: Path) -> Section:
    rows, damaged = read_metrics(run.folder / METRICS)
    last = {name: value for row in rows for name, value in row.items()}
    picture = run.folder / PICTURE
    return Section(
        anchor=f"run-{number}",
        title=_relative(run.folder, folder),
        run=run.summary,
        charts=curves.charts(rows),
        damaged_lines=len(damaged),
        layers=[_layer_cells(layer, last) for layer in run.summary.layers if isinstance(layer, dict)],
        picture=base64.b64encode(picture.read_bytes()).decode() if picture.is_file() else None,
    )


def _relative(path: Path, folder: Path) -> str:
    text = str(path.relative_to(folder))
    return folder.resolve().name if text == "." else text


def _change(summary: RunSummary) -> float | None:
    if summary.top1 is None or summary.fp_top1 is None or summary.full_precision:
        return None
    return summary.top1 - summary.fp_top1


RUN_COLUMNS: dict[str, Callable[[RunSummary], Cell]] = {
    "Data": lambda s: word(s.dataset),
    "Model": lambda s: word(s.model),
    "Quantizer": lambda s: word(s.quantizer),
    "W bits": lambda s: number(s.w_bits, "{:g}".format),
    "A bits": lambda s: number(s.a_bits, "{:g}".format),
    "Training": lambda s: word(f"{s.way} ({s.distill})" if s.distilled and isinstance(s.distill, str) else s.way),
    "Seed": lambda s: number(s.seed, "{:g}".format),
    "Epochs": lambda s: number(s.epochs, "{:g}".format),
    "Top-1 %": lambda s: number(s.top1, "{:.2f}".format),
    "Change": lambda s: number(_change(s), "{:+.2f}".format),
    "Calibrated %": lambda s: number(s.ptq_top1, "{:.2f}".format),
    "Size": lambda s: number(s.size_bytes, size_text),
    "Smaller": lambda s: number(s.compression, "{:.1f}x".format),
    "Bits/weight": lambda s: number(s.effective_bits, "{:.2f}".format),
    "GBOPs": lambda s: number(s.bops, lambda value: f"{value / 1e9:.3g}"),
    "ms/step": lambda s: number(s.step_ms, "{:.1f}".format),
    "Time": lambda s: number(s.wall_s, lambda value: f"{value:.0f} s" if value < 600 else f"{value / 60:.0f} min"),
}

LAYER_COLUMNS = ("Layer", "Kind", "Weight", "W bits", "A bits", "Bits/weight", "Size", "MMACs", "MBOPs")
HEALTH_COLUMNS = {
    "W error %": "error/{}.weight",
    "A error %": "error/{}.input",
    "A clipped %": "clipped/{}.input",
    "W dead %": "dead/{}.weight",
}
"""Column of the per-layer table -> the metric of metrics.jsonl that it shows, as it was last: a share."""


def _run_cells(summary: RunSummary) -> list[Cell]:
    return [cell(summary) for cell in RUN_COLUMNS.values()]


def _layer_cells(layer: dict[str, Any], last: dict[str, Any]) -> list[Cell]:
    """One row of the per-layer table; fields that an older version did not write stay empty.

    ``last`` are the latest metrics of the run's metrics by name.
    """
    shape = layer.get("shape") or []
    bits = layer.get("weight_storage_bits")
    health = [last.get(metric.format(layer.get("name"))) for metric in HEALTH_COLUMNS.values()]
    own = layer.get("name") == OUTSIDE_LAYERS  # no weight, so that these cells would mean nothing
    return [
        word(layer.get("name")),
        word(layer.get("kind")),
        Cell("x".join(str(n) for n in shape), float(math.prod(shape)) if shape else -math.inf),
        number(None if own else layer.get("weight_bits"), _bits_text),
        number(layer.get("input_bits"), _bits_text),
        number(None if own else layer.get("effective_bits"), "{:.2f}".format),
        number(bits / 8 if isinstance(bits, int | float) and not own else None, size_text),
        number(layer.get("macs"), lambda value: f"{value / 1e6:.3g}"),
        number(layer.get("bops"), lambda value: f"{value / 1e6:.4g}"),
        *(number(value, lambda value: f"{100 * value:.3g}") for value in health),
    ]


def _bits_text(bits: float) -> str:
    return "float" if bits == FULL_PRECISION else f"{bits:g}"
