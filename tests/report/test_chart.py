"""The look of charts, and the script that draws them."""

from __future__ import annotations

import re
from pathlib import Path

import altair as alt
import numpy as np
from PIL import Image

from qtrain.report import chart


def test_spec_reads_the_chosen_trial_and_names_no_address() -> None:
    made = chart.spec(alt.Chart(alt.InlineData(values=[{"x": 1}])).mark_point().encode(x="x:Q"))
    assert {"name": "chosen", "value": 0} in made["params"] and "http" not in str(made)


def test_colors_are_the_pages() -> None:
    colors = re.findall(r"#[0-9a-f]{3,6}\b|rgb", str(chart.LOOK))
    assert colors == [] and "var(--front)" in str(chart.LOOK)


def test_png_has_the_colors_of_a_light_page(tmp_path: Path) -> None:
    data = alt.InlineData(values=[{"x": 1, "y": 1}, {"x": 2, "y": 3}])
    line = alt.Chart(data).mark_line(color=chart.CSS_COLORS[1], strokeWidth=9).encode(x="x:Q", y="y:Q")
    for width, size in (("container", (1200, 750)), (200, None)):
        chart.write_png(line.properties(width=width, height=100), tmp_path / "a.png")
        image = Image.open(tmp_path / "a.png").convert("RGB")
        assert image.size == size if size else 300 < image.size[0] < 400
        for color in ("#ffffff", chart.light_colors()["--c1"]):
            wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
            assert (np.asarray(image) == wanted).all(axis=-1).sum() > 500


def test_each_color_of_charts_is_one_of_the_page() -> None:
    named = {chart.INK, chart.SOFT, chart.GRID, chart.BACKGROUND, *chart.CSS_COLORS}
    assert named <= {f"var({name})" for name in chart.light_colors()}
    assert chart.light_colors()["--back"] == "#ffffff"


def test_library_is_one_small_script_that_loads_nothing() -> None:
    """Addresses in it are names of XML namespaces and of schemas, and links that are followed by a click."""
    script = chart.library()
    assert len(script) < 1_000_000 and "</script" not in script and "vegaEmbed" in script
    hosts = set(re.findall(r"https?://([\w.-]+)", script))
    assert hosts <= {"www.w3.org", "vega.github.io", "github.com"}
    assert not re.search(r"\bimport\s*\(|importScripts|from\s*[\"']https?:", script)
