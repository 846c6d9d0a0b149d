"""The W&B workspace that shows the accuracy of runs against their costs, made of W&B's own objects."""

from collections.abc import Sequence

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws
from wandb_workspaces.expr import And
from wandb_workspaces.reports.v2.interface import PanelTypes

COSTS = {"compression": "Times smaller than full precision", "bops": "Bit operations", "size_bytes": "Bytes"}
"""Metrics of a run's summary against which accuracy is drawn, and the labels of their axes."""

MOST_RUNS = 200
"""The largest number of lines in a panel; W&B's own limit is 10."""


def make_workspace(
    *, entity: str, project: str, name: str, accuracy: str, group: str | None, knobs: Sequence[str]
) -> ws.Workspace:
    """Panels of accuracy against each cost, knobs, learning curves, and bits of each layer.

    ``accuracy`` is a metric of the runs' summaries. If ``group`` is given, only its runs are shown. ``knobs`` are names
    below ``knobs`` in their configs.
    """
    sections = [
        ws.Section(name="Accuracy against cost", panels=_scatters(accuracy), is_open=True, pinned=True),
        ws.Section(name="What was chosen", panels=_choices(accuracy, knobs), is_open=True),
        ws.Section(name="Learning curves", panels=_curves(), is_open=True),
        ws.Section(name="Bits of each layer", panels=_bits(), is_open=True),
    ]
    columns = [f"summary:{metric}" for metric in (accuracy, *COSTS, "effective_bits", "status")]
    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=sections,
        settings=ws.WorkspaceSettings(max_runs=MOST_RUNS),
        runset_settings=ws.RunsetSettings(
            filters=And(ws.Metric("Group") == group) if group else [],
            order=[ws.Ordering(ws.Summary(accuracy), ascending=False)],
            pinned_columns=["run:displayName", *columns],
        ),
    )


def _scatters(accuracy: str) -> list[PanelTypes]:
    return [
        wr.ScatterPlot(
            title=f"{accuracy} against {label.lower()}",
            x=wr.SummaryMetric(cost),
            y=wr.SummaryMetric(accuracy),
            log_x=cost == "bops",
            layout=wr.Layout(x=8 * number, y=0, w=8, h=8),
        )
        for number, (cost, label) in enumerate(COSTS.items())
    ]


def _choices(accuracy: str, knobs: Sequence[str]) -> list[PanelTypes]:
    chosen = [wr.ParallelCoordinatesPlotColumn(wr.Config(f"knobs.{knob}"), display_name=knob) for knob in knobs]
    if not knobs:  # runs outside of a sweep mostly differ in these
        chosen = [wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric(bits)) for bits in ("w_bits", "a_bits")]
    reached = [
        wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric("size_bytes"), log=True),
        wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric("bops"), log=True),
        wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric(accuracy)),
    ]
    return [
        wr.ParallelCoordinatesPlot(
            title="Choices, cost and accuracy", columns=[*chosen, *reached], layout=wr.Layout(x=0, y=0, w=16, h=9)
        ),
        wr.ParameterImportancePlot(with_respect_to=accuracy, layout=wr.Layout(x=16, y=0, w=8, h=9)),
    ]


def _curves() -> list[PanelTypes]:
    """Curves of each run, and of the mean of a group with its range."""
    return [
        wr.LinePlot(
            title="Top-1 on validation images, %",
            x="epoch",
            y=["val/top1"],
            max_runs_to_show=MOST_RUNS,
            layout=wr.Layout(x=0, y=0, w=8, h=8),
        ),
        wr.LinePlot(
            title="The same, by group: mean and range",
            x="epoch",
            y=["val/top1"],
            groupby="Group",
            groupby_aggfunc="mean",
            groupby_rangefunc="minmax",
            layout=wr.Layout(x=8, y=0, w=8, h=8),
        ),
        wr.LinePlot(
            title="Training loss",
            x="step",
            y=["train/total"],
            max_runs_to_show=MOST_RUNS,
            layout=wr.Layout(x=16, y=0, w=8, h=8),
        ),
    ]


def _bits() -> list[PanelTypes]:
    """A line for each run over the layers in the order of the forward, and the table with their names."""
    plots: list[PanelTypes] = [
        wr.LinePlot(
            title=f"Bits of each layer's {kind}",
            x="layer",
            y=[f"bits/{kind}"],
            title_x="layer",
            max_runs_to_show=MOST_RUNS,
            layout=wr.Layout(x=8 * number, y=0, w=8, h=8),
        )
        for number, kind in enumerate(("weight", "input"))
    ]
    return [*plots, wr.WeavePanelSummaryTable(table_name="allocation", layout=wr.Layout(x=16, y=0, w=8, h=8))]
