"""Bits of each layer of the front's models."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import vl_convert

from qtrain.report import chart
from qtrain.report.bits_plot import layer_bits, layer_cells
from qtrain.sweep.sweep_results import SweepResults, read_sweep
from qtrain.sweep.trial import Trial


@pytest.fixture
def sweep(sweep_folder: Path) -> SweepResults:
    return read_sweep(sweep_folder)


def with_trials(sweep: SweepResults, trials: list[Trial]) -> SweepResults:
    return SweepResults(sweep.folder, sweep.config, trials, sweep.objectives)


def test_equal_bits_of_weights_and_inputs_are_shown_once(sweep: SweepResults) -> None:
    """Two models of six layers."""
    cells = layer_cells(sweep)
    assert [cell.text for cell in cells] == [*"844448", *"844228"]
    assert {cell.what for cell in cells} == {"weights and inputs"} and [cell.trial for cell in cells[::6]] == [1, 2]
    assert cells[0].strength > cells[1].strength > cells[9].strength


def test_different_bits_of_inputs_have_rows_of_their_own(sweep: SweepResults) -> None:
    different = [replace(t, layer_bits={name: [w, 8] for name, (w, _) in t.layer_bits.items()}) for t in sweep.trials]
    cells = layer_cells(with_trials(sweep, different))
    assert [cell.text for cell in cells] == [*"844448", *"844228", *"888888", *"888888"]
    assert list(dict.fromkeys(cell.what for cell in cells)) == ["weights", "inputs"]


def test_full_precision_is_said_in_words(sweep: SweepResults) -> None:
    floats = [replace(t, layer_bits={"conv1": [32, 32]}) for t in sweep.trials]
    assert [cell.text for cell in layer_cells(with_trials(sweep, floats))] == ["float", "float"]


def test_chart_has_the_numbers_of_the_cells(sweep: SweepResults) -> None:
    drawn = layer_bits(sweep)
    assert drawn is not None
    (rows,) = chart.spec(drawn)["datasets"].values()
    assert [row["text"] for row in rows] == [cell.text for cell in layer_cells(sweep)]


def test_weights_are_drawn_above_inputs_and_the_best_model_on_top(sweep: SweepResults) -> None:
    """As Vega places them: heights of the texts in the picture, from its top."""
    different = [replace(t, layer_bits={name: [w, 8] for name, (w, _) in t.layer_bits.items()}) for t in sweep.trials]
    drawn = layer_bits(with_trials(sweep, different))
    assert drawn is not None
    svg = vl_convert.vegalite_to_svg(chart.spec(drawn))
    heights: dict[str, list[float]] = {}

    def walk(element: ElementTree.Element, up: float) -> None:
        moved = re.match(r"translate\([-\d.e]+,([-\d.e]+)\)", element.get("transform", ""))
        up += float(moved[1]) if moved else 0.0
        if element.text and element.text.strip():
            heights.setdefault(element.text, []).append(up)
        for part in element:
            walk(part, up)

    walk(ElementTree.fromstring(svg), 0.0)
    (weights,), (inputs,) = heights["weights"], heights["inputs"]
    first, second = (heights[name] for name in dict.fromkeys(cell.model for cell in layer_cells(sweep)))
    assert weights < inputs and len(first) == 2
    assert weights < first[0] < second[0] < inputs < first[1] < second[1]


def test_unknown_bits_are_no_picture(sweep: SweepResults) -> None:
    assert layer_bits(with_trials(sweep, [replace(t, layer_bits={}) for t in sweep.trials])) is None
