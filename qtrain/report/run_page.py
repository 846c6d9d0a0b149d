"""All runs below a folder on one page.

``report.html`` needs nothing beside it: charts, style and scripts are inside, so that it can be sent around. It is made
from ``summary.json``, ``metrics.jsonl``, ``examples.json`` and ``export/verify.json`` alone. A run that did not finish,
or whose files are damaged, is listed with the reason.
"""

import base64
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from qtrain.costs.count import OUTSIDE_LAYERS
from qtrain.data.image_grid import PICTURE
from qtrain.pipeline.summary import Run, RunSummary, gather
from qtrain.report.chart import spec, write_png
from qtrain.report.examples import read_examples
from qtrain.report.export_section import COMPARISONS, Export, read_export
from qtrain.report.html import Cell, number, render, word
from qtrain.report.run_plots import BIT_OPERATIONS, COMPRESSION, Curve, accuracy_scatter, curves, curves_chart
from qtrain.report.scatter_chart import draw_scatter
from qtrain.report.seed_groups import SeedGroup, seed_groups
from qtrain.report.table import closing_table, size_text, table_notes
from qtrain.report.teacher_gain import gain_lines
from qtrain.settings.run_files import METRICS
from qtrain.spec import FULL_PRECISION
from qtrain.utils.atomic_write import write_text
from qtrain.utils.json_lines import read_metrics

REPORT = "report.html"
PLOTS = {
    "accuracy_vs_compression": ("Accuracy against compression", COMPRESSION),
    "accuracy_vs_bops": ("Accuracy against bit operations", BIT_OPERATIONS),
}
"""Name of a picture -> its title and its cost axis."""

MOST_POINTS, POINTS_OF_A_PAGE = 240, 25_000
"""Curve of one curve, and about so many of all curves: the page stays under 2 MB."""


@dataclass(frozen=True)
class Section:
    """What the page shows of one run below the tables; ``picture`` is a PNG of images synthesized from the model.

    ``export`` is what became of the run's export, ``None`` where it has none.
    """

    anchor: str
    title: str
    run: RunSummary
    curves: dict[str, dict[str, Curve]]
    damaged_lines: int
    layers: list[list[Cell]]
    picture: str | None
    export: Export | None

    @property
    def charts(self) -> list[tuple[str, str]]:
        """(name, title) of each chart."""
        return [(f"{self.anchor}-{place}", title) for place, title in enumerate(self.curves)]

    @property
    def export_chart(self) -> str:
        """The name of the chart of the export."""
        return f"{self.anchor}-export"


def write_report(folder: Path) -> tuple[Path, int, int]:
    """The page and its plots in ``folder``; returns the page's path, the runs shown, and the runs only listed.

    Raises ``FileNotFoundError`` where there is no such folder or no run below it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"report.folder: there is no folder {folder}; give the one that holds the runs")
    runs, problems = gather(folder)
    if not runs and not problems:
        raise FileNotFoundError(f"report.folder: no run below {folder}; train one first, or give another folder")
    rows = seed_groups(run.summary for run in runs)
    sections = [_section(number, run, folder) for number, run in enumerate(runs)]
    charts = _curve_charts(sections) | _export_charts(sections)
    scatters = _scatter_charts(rows, folder)
    columns, closing = closing_table(rows)
    page = render(
        "report.html.j2",
        title=folder.resolve().name,
        plots=[{"name": name, "title": PLOTS[name][0]} for name in scatters],
        charts=charts | scatters,
        columns=columns,
        closing=closing,
        notes=table_notes(rows),
        gains=gain_lines(run.summary for run in runs),
        examples=read_examples(runs),
        run_columns=list(RUN_COLUMNS),
        sections=sections,
        run_rows=[(section, _run_cells(one)) for section in sections for one in section.run.by_width()],
        comparison_columns=COMPARISONS,
        layer_columns=(*LAYER_HEADINGS, *HEALTH_COLUMNS),
        problems=[(_relative(problem.folder, folder), problem.reason) for problem in problems],
    )
    write_text(folder / REPORT, page)
    return folder / REPORT, len(runs), len(problems)


def _scatter_charts(rows: list[SeedGroup], folder: Path) -> dict[str, dict[str, object]]:
    """Each of :data:`PLOTS` as a PNG in ``folder``, and its chart; without those that have no point."""
    charts = {}
    for name, (_, axis) in PLOTS.items():
        path = folder / f"{name}.png"
        if (scatter := accuracy_scatter(rows, axis)) is None:
            path.unlink(missing_ok=True)  # of an earlier report
            continue
        chart = draw_scatter(scatter)
        write_png(chart, path)
        charts[name] = spec(chart)
    return charts


def _curve_charts(sections: list[Section]) -> dict[str, dict[str, object]]:
    lines = sum(len(by_name) for section in sections for by_name in section.curves.values())
    most = max(2, min(MOST_POINTS, POINTS_OF_A_PAGE // max(1, lines)))
    return {
        name: spec(curves_chart(section.curves[title], most=most))
        for section in sections
        for name, title in section.charts
    }


def _export_charts(sections: list[Section]) -> dict[str, dict[str, object]]:
    exports = {section.export_chart: section.export for section in sections if section.export is not None}
    return {name: spec(export.picture) for name, export in exports.items() if export.picture is not None}


def _section(number: int, run: Run, folder: Path) -> Section:
    rows, damaged = read_metrics(run.folder / METRICS)
    last = {name: value for row in rows for name, value in row.items()}
    picture = run.folder / PICTURE
    return Section(
        anchor=f"run-{number}",
        title=_relative(run.folder, folder),
        run=run.summary,
        curves=curves(rows),
        damaged_lines=len(damaged),
        layers=[_layer_cells(layer, last) for layer in run.summary.layers if isinstance(layer, dict)],
        picture=base64.b64encode(picture.read_bytes()).decode() if picture.is_file() else None,
        export=read_export(run.folder),
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

LAYER_HEADINGS = ("Layer", "Kind", "Weight", "W bits", "A bits", "Bits/weight", "Size", "MMACs", "MBOPs")
HEALTH_COLUMNS = {
    "W error %": "error/{}.weight",
    "A error %": "error/{}.input",
    "A clipped %": "clipped/{}.input",
    "A negative %": "negative/{}.input",
    "W dead %": "dead/{}.weight",
}
"""Column of the per-layer table -> the metric of metrics.jsonl that it shows, as it was last: a share."""


def _run_cells(summary: RunSummary) -> list[Cell]:
    return [cell(summary) for cell in RUN_COLUMNS.values()]


def _layer_cells(layer: Mapping[str, object], last: Mapping[str, object]) -> list[Cell]:
    """One row of the per-layer table; fields that an older version did not write stay empty.

    ``last`` are the run's latest metrics by name.
    """
    shape = found if isinstance(found := layer.get("shape"), list) else []
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
