"""The export of a run on its page: each comparison with the student, layer by layer, from ``verify.json``."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import altair as alt

from qtrain.report import chart
from qtrain.report.html import Cell, number, word
from qtrain.settings.run_files import EXPORTED, STUDENT, VERDICT
from qtrain.utils.digest import file_digest

FAINT, STRONG = 0.08, 0.7
"""Opacity of a single differing code and of a layer whose codes all differ."""

WRITTEN = 40
"""Up to so many layers, the picture has the number of differing codes in each cell."""


@dataclass(frozen=True)
class Export:
    """What the page shows: ``passed``, ``summary`` in words, and the tables of comparisons and of layers.

    ``problem`` is the reason why there is nothing to show, where ``verify.json`` cannot be read.
    """

    passed: bool = False
    summary: str = ""
    comparisons: tuple[list[Cell], ...] = ()
    columns: tuple[str, ...] = ()
    layers: tuple[list[Cell], ...] = ()
    picture: alt.TopLevelMixin | None = None
    problem: str = ""


COMPARISONS = ("Comparison", "Codes", "Differ", "At most steps", "Predictions that differ", "Faults and notes")
"""Columns of the table of comparisons."""


def read_export(folder: Path) -> Export | None:
    """The export of the run in ``folder``, ``None`` where there is none."""
    file = folder / EXPORTED / VERDICT
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if "student" in found and (student := folder / STUDENT).is_file() and found["student"] != file_digest(student):
            return Export(problem=f"{EXPORTED} is of an earlier student of this run; task=export writes it anew")
        return _export(found)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        return Export(
            problem=f"{EXPORTED}/{VERDICT} cannot be read ({type(error).__name__}); task=verify writes it anew"
        )


def _export(found: Mapping[str, Any]) -> Export:
    tiers: dict[str, dict[str, Mapping[str, Any]]] = {
        tier["name"]: {row["layer"]: row for row in tier["layers"]} for tier in found["tiers"] if tier["layers"]
    }
    names = list(dict.fromkeys(layer for rows in tiers.values() for layer in rows))
    summary = f"Compared on {found['images']} images ({found['compared_on']})."
    if "top1" in found:
        parts = ", ".join(f"{name} {float(top1):.2f} %" for name, top1 in found["top1"].items())
        summary += f" Top-1 on {found['test_images']} images: {parts}."
    return Export(
        passed=bool(found["passed"]),
        summary=summary,
        comparisons=tuple(_comparison(tier) for tier in found["tiers"]),
        columns=("Layer", "Codes", *tiers),
        layers=tuple(_layer(name, tiers) for name in names),
        picture=differing_codes(tiers) if names else None,
    )


def _comparison(tier: Mapping[str, Any]) -> list[Cell]:
    layers, faults = tier["layers"], [str(fault) for fault in tier["faults"]]
    totals = [sum(row[key] for row in layers) if layers else None for key in ("elements", "differing")]
    steps = max((row["steps"] for row in layers), default=None)
    predictions = len(tier["disagreeing"]) if layers else None
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    numbers = [number(value, "{:.0f}".format) for value in (*totals, steps, predictions)]
    said = [*([faults[0] + more] if faults else []), *map(str, tier.get("notes", []))]
    return [word(tier["name"]), *numbers, word("; ".join(said))]


def _layer(name: str, tiers: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[Cell]:
    elements = max(rows[name]["elements"] for rows in tiers.values() if name in rows)
    return [word(name), number(elements, "{:.0f}".format), *(_difference(rows.get(name)) for rows in tiers.values())]


def _difference(row: Mapping[str, Any] | None) -> Cell:
    """How many codes differ, by how many steps, and why."""
    if row is None:
        return word(None)
    if not row["differing"]:
        return Cell("0", 0.0)
    steps = f"{row['steps']} step{'s' if row['steps'] > 1 else ''}"
    return Cell(f"{row['differing']} by {steps}: {row['cause']}", float(row["differing"]))


def differing_codes(tiers: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> alt.TopLevelMixin:
    """Layers from left to right, a row for each comparison; the more of a layer's codes differ, the darker its cell."""
    cells = [_cell(tier, row) for tier, rows in tiers.items() for row in rows.values()]
    base = alt.Chart().encode(
        x=alt.X("layer:N", sort=None, title=None, axis=alt.Axis(labelAngle=-90, labelLimit=140, labelOverlap=True)),
        y=alt.Y("comparison:N", sort=None, title=None, axis=alt.Axis(labelLimit=200)),
        tooltip="tip:N",
    )
    squares = base.mark_rect(color=chart.CSS_COLORS[0], stroke=chart.BACKGROUND).encode(
        opacity=alt.Opacity("strength:Q", scale=None, legend=None)
    )
    layers = {cell["layer"] for cell in cells}
    texts = [base.mark_text(fontSize=9).encode(text="text:N")] if len(layers) <= WRITTEN else []
    return alt.layer(squares, *texts, data=alt.InlineData(values=cells)).properties(
        width="container", height=alt.Step(22)
    )


def _cell(tier: str, row: Mapping[str, Any]) -> dict[str, object]:
    differing, elements = int(row["differing"]), max(1, int(row["elements"]))
    # Equal steps for 1 in a million, 10 in a million and so on, so that one code is seen and a thousand stand out.
    share = max(0.0, min(1.0, 1 + math.log10(differing / elements) / 6)) if differing else 0.0
    return {
        "layer": row["layer"],
        "comparison": tier,
        "text": str(differing) if differing else "",
        "strength": FAINT + share * (STRONG - FAINT) if differing else 0.0,
        "tip": f"{row['layer']}: {differing} of {elements} codes differ\n{row['cause']}".strip(),
    }
