"""The look of charts, and the script that draws them."""

from __future__ import annotations

import re

import altair as alt

from qtrain.report import chart


def test_spec_reads_the_chosen_trial_and_names_no_address() -> None:
    made = chart.spec(alt.Chart(alt.InlineData(values=[{"x": 1}])).mark_point().encode(x="x:Q"))
    assert {"name": "chosen", "value": 0} in made["params"] and "http" not in str(made)


def test_colors_are_the_pages() -> None:
    colors = re.findall(r"#[0-9a-f]{3,6}\b|rgb", str(chart.LOOK))
    assert colors == [] and "var(--front)" in str(chart.LOOK)


def test_library_is_one_small_script_that_loads_nothing() -> None:
    """Addresses in it are names of XML namespaces and of schemas, and links that are followed by a click."""
    script = chart.library()
    assert len(script) < 1_000_000 and "</script" not in script and "vegaEmbed" in script
    hosts = set(re.findall(r"https?://([\w.-]+)", script))
    assert hosts <= {"www.w3.org", "vega.github.io", "github.com"}
    assert not re.search(r"\bimport\s*\(|importScripts|from\s*[\"']https?:", script)
