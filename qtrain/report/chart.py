"""Charts by Vega-Altair: their look, the script that draws them on a page offline, and PNGs.

A chart names its colors by custom properties of the page (``var(--c0)``), so that it is light or dark with the page.
"""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert

from qtrain.utils.atomic_write import atomic_write

TEMPLATES = Path(__file__).resolve().parent / "templates"

INK, SOFT, GRID, BACKGROUND = "var(--front)", "var(--soft)", "var(--line)", "var(--back)"
CSS_COLORS = tuple(f"var(--c{number})" for number in range(6))
CHOSEN = "datum.trial === chosen"
"""True for the trial under the pointer, in this chart or elsewhere on the page."""

AXIS = {
    "domain": False, "ticks": False, "gridColor": GRID, "labelColor": INK, "labelFontSize": 11, "labelPadding": 6,
    "titleColor": INK, "titleFontSize": 12, "titleFontWeight": "normal",
}  # fmt: skip
LEGEND = {
    "orient": "bottom", "labelColor": INK, "labelFontSize": 11, "labelLimit": 300, "symbolLimit": 0, "symbolOpacity": 1,
}  # fmt: skip
LOOK = {
    "background": "transparent",
    "font": "system-ui, sans-serif",
    "axis": AXIS,
    "view": {"stroke": None},
    "header": {"labelColor": INK, "titleColor": INK, "labelFontSize": 12},
    "legend": LEGEND,
    "text": {"color": INK},
}
"""The look of all charts, which the page says once."""


def spec(chart: alt.TopLevelMixin) -> dict[str, object]:
    """``chart`` as Vega-Lite's JSON, with the parameter that :data:`CHOSEN` reads."""
    made: dict[str, Any] = chart.to_dict(validate=False)
    made.pop("$schema", None)  # an address that nobody has to load
    chosen = {"name": "chosen", "value": 0}
    return {**made, "params": [*made.get("params", []), chosen]}


def write_png(chart: alt.TopLevelMixin, path: Path) -> None:
    """``chart`` in the colors of a light page: 1200 by 750 pixels, or 1.5 times the size that its panels have.

    The file appears only when it is whole.
    """
    made = {**spec(chart), "config": {**LOOK, "background": BACKGROUND}}
    if made.get("width") == "container":
        made |= {"width": 800, "height": 500, "autosize": {"type": "fit", "contains": "padding"}}
    colored = re.sub(r"var\((--\w+)\)", lambda found: light_colors()[found[1]], json.dumps(made, ensure_ascii=False))
    with atomic_write(path) as temporary:
        temporary.write_bytes(vl_convert.vegalite_to_png(in_utf8(colored), scale=1.5))


def in_utf8(text: str) -> str:
    """``text`` with a question mark for what UTF-8 does not hold: names of files may come from elsewhere."""
    return text.encode("utf-8", "replace").decode()


@cache
def light_colors() -> dict[str, str]:
    """The page's custom properties that are colors; those of a light page stand first in its style."""
    style = (TEMPLATES / "page.css").read_text(encoding="utf-8")
    return dict(reversed(re.findall(r"(--\w+): (#\w{6});", style)))


@cache
def library() -> str:
    """Vega, Vega-Lite and vega-embed as one script of 0.9 MB, for the inside of a ``<script>`` element."""
    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed")).replace("</script", "<\\/script")
