"""The page of a search over bits: bits, sensitivity and cost of each layer, and predicted against measured loss."""

from collections.abc import Iterator
from pathlib import Path

import altair as alt

from qtrain.pipeline.allocate_run import AllocateRun
from qtrain.report import chart
from qtrain.report.allocation_table import front_table, layer_table, total_table
from qtrain.report.chart import spec
from qtrain.report.html import render
from qtrain.spec.allocation import Role
from qtrain.utils.atomic_write import write_text

PAGE = "allocation.html"
HEIGHT = 180


def write_allocation_page(made: AllocateRun, *, title: str) -> Path:
    """The page beside the allocation's file; returns its path."""
    charts = dict(_charts(made))
    tables = {"Found and uniform": total_table(made), "Layers": layer_table(made)}
    if len(made.found.front) > 1:
        tables["Points of the front"] = front_table(made)
    page = render(
        "allocation.html.j2",
        title=title,
        file=made.file.name,
        headings=list(charts),
        charts={str(number): spec(one) for number, one in enumerate(charts.values())},
        tables=tables,
    )
    write_text(made.file.parent / PAGE, page)
    return made.file.parent / PAGE


def _charts(made: AllocateRun) -> Iterator[tuple[str, alt.TopLevelMixin]]:
    """Headings and charts, those of which something is known."""
    found = made.found
    yield (
        "Bits",
        _bars(
            [
                {"layer": name, "what": what, "value": value}
                for name, bits in found.allocation.items()
                for what, value in (("weights", bits.weight), ("inputs", bits.input))
            ],
            "bits",
        ),
    )
    if found.problem.scores.weight:
        yield "Sensitivity: expected rise of the loss, by layer and width", _sensitivity(made)
    costs = [
        {"layer": name, "what": metric, "value": table.layers[name][bits] / table.total(found.allocation)}
        for metric, table in found.problem.costs.items()
        for name, bits in found.allocation.items()
    ]
    if costs:
        yield "Cost: each layer's part of the whole model's", _bars(costs, "part")
    if made.measured:
        yield "Predicted against measured", _measured(made)
    if len(made.found.front) > 1 and found.problem.budgets:
        yield "The front within the budgets", _front(made)


def _layer_axis() -> alt.X:
    return alt.X("layer:N", sort=None, title=None, axis=alt.Axis(labelAngle=-90, labelLimit=160))


def _bars(rows: list[dict[str, object]], title: str) -> alt.TopLevelMixin:
    """A bar for each layer and each ``what``, side by side."""
    drawn: alt.TopLevelMixin = (
        alt.Chart(alt.InlineData(values=rows))
        .mark_bar()
        .encode(
            x=_layer_axis(),
            xOffset=alt.XOffset("what:N", sort=None),
            y=alt.Y("value:Q", title=title),
            color=alt.Color("what:N", sort=None, title=None, scale=alt.Scale(range=list(chart.CSS_COLORS))),
            tooltip=["layer:N", "what:N", "value:Q"],
        )
        .properties(width="container", height=HEIGHT)
    )
    return drawn


def _sensitivity(made: AllocateRun) -> alt.TopLevelMixin:
    """A line for each width over the layers, on a logarithmic scale; weights above inputs."""
    sides: dict[Role, str] = {"weight": "weights", "input": "inputs"}
    scores = made.found.problem.scores
    rows = [
        {"layer": layer, "bits": str(bits), "value": value, "what": name}
        for role, name in sides.items()
        for layer in made.found.layers
        for bits, value in sorted(getattr(scores, role).get(layer, {}).items())
        if value > 0
    ]
    base = (
        alt.Chart()
        .mark_line(point=True)
        .encode(
            x=_layer_axis(),
            y=alt.Y("value:Q", title="score", scale=alt.Scale(type="log"), axis=alt.Axis(tickCount=5)),
            color=alt.Color("bits:N", sort=None, title="bits", scale=alt.Scale(range=list(chart.CSS_COLORS))),
            tooltip=["layer:N", "what:N", "bits:N", "value:Q"],
        )
        .properties(width=900, height=HEIGHT)
    )
    return alt.layer(base, data=alt.InlineData(values=rows)).facet(
        row=alt.Row(
            "what:N", sort=list(sides.values()), title=None, header=alt.Header(labelOrient="top", labelAnchor="start")
        )
    )


def _measured(made: AllocateRun) -> alt.TopLevelMixin:
    drawn: alt.TopLevelMixin = (
        alt.Chart(alt.InlineData(values=[row._asdict() for row in made.measured]))
        .mark_point(filled=True, size=70)
        .encode(
            x=alt.X("score:Q", title="predicted: score", scale=alt.Scale(zero=False)),
            y=alt.Y("loss:Q", title="measured: loss on the calibration images", scale=alt.Scale(zero=False)),
            color=alt.Color("name:N", sort=None, title=None, scale=alt.Scale(range=list(chart.CSS_COLORS))),
            tooltip=["name:N", "score:Q", "loss:Q"],
        )
        .properties(width="container", height=2 * HEIGHT)
    )
    return drawn


def _front(made: AllocateRun) -> alt.TopLevelMixin:
    scale = alt.Scale(type="log") if min(point.score for point in made.found.front) > 0 else alt.Scale()
    (metric, *_) = made.found.problem.budgets
    rows = [{"cost": point.costs[metric], "score": point.score} for point in made.found.front]
    title = f"{metric} ({made.found.problem.costs[metric].unit})"
    drawn: alt.TopLevelMixin = (
        alt.Chart(alt.InlineData(values=rows))
        .mark_line(point=True, color=chart.CSS_COLORS[0])
        .encode(
            x=alt.X("cost:Q", title=title, scale=alt.Scale(zero=False)),
            y=alt.Y("score:Q", title="score", scale=scale),
            tooltip=["cost:Q", "score:Q"],
        )
        .properties(width="container", height=2 * HEIGHT)
    )
    return drawn
