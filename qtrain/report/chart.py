"""Interactive charts of a page by Vega-Altair: their look, and the one script that draws them offline.

A chart names its colors by custom properties of the page (``var(--c0)``), so that it is light or dark with the page.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import altair as alt
import vl_convert
from matplotlib.figure import Figure

Picture = tuple[alt.TopLevelMixin, Figure]
"""The same data twice: a chart for a page, a figure for a PNG."""

INK, SOFT, GRID, BACKGROUND = "var(--front)", "var(--soft)", "var(--line)", "var(--back)"
CSS_COLORS = tuple(f"var(--c{number})" for number in range(6))
CHOSEN = "datum.trial === chosen"
"""True for the trial under the pointer, in this chart or elsewhere on the page."""

AXIS = {
    "domain": False, "ticks": False, "gridColor": GRID, "labelColor": INK, "labelFontSize": 11, "labelPadding": 6,
    "titleColor": INK, "titleFontSize": 12, "titleFontWeight": "normal",
}  # fmt: skip
LOOK = {
    "background": "transparent",
    "font": "system-ui, sans-serif",
    "axis": AXIS,
    "view": {"stroke": None},
    "header": {"labelColor": INK, "titleColor": INK, "labelFontSize": 12},
    "legend": {"orient": "bottom", "labelColor": INK, "labelFontSize": 11, "labelLimit": 300, "symbolLimit": 0},
    "text": {"color": INK},
}
"""The look of all charts, which the page says once."""


def spec(chart: alt.TopLevelMixin) -> dict[str, object]:
    """``chart`` as Vega-Lite's JSON, with the parameter that :data:`CHOSEN` reads."""
    made: dict[str, Any] = chart.to_dict(validate=False)
    made.pop("$schema", None)  # an address that nobody has to load
    chosen = {"name": "chosen", "value": 0}
    return {**made, "params": [*made.get("params", []), chosen]}


@cache
def library() -> str:
    """Vega, Vega-Lite and vega-embed as one script of 0.9 MB, for the inside of a ``<script>`` element."""
    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed")).replace("</script", "<\\/script")
