"""The pictures of a sweep: what is drawn, where, and in whose colors."""

from __future__ import annotations

import re
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from qtrain.report.canvas import DARK, LIGHT, MARK, png, svg
from qtrain.report.parallel_plot import parallel

from qtrain.report.bits_plot import layer_bits
from qtrain.report.pareto_plot import against, planes
from qtrain.report.sweep_plots import importance, learning_curves, plots
from qtrain.sweep.sweep_results import SweepResults, read_sweep
from qtrain.sweep.trial import Trial


@pytest.fixture
def sweep(sweep_folder: Path) -> SweepResults:
    return read_sweep(sweep_folder)


def marked(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    """The points of each line that stands for a trial, by its number."""
    return {
        str(line.get_gid()).removeprefix(MARK): [tuple(map(float, point)) for point in line.get_xydata()]  # type: ignore[misc]
        for line in axes.get_lines()
        if line.get_gid()
    }


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_trials_stand_where_their_metrics_are(sweep: SweepResults) -> None:
    """Sizes in kB; the stopped trial is drawn, the failed one and the duplicate are not; places are on the front."""
    figure = against(sweep, "size_bytes", LIGHT)
    assert figure is not None
    points = marked(figure.axes[0])
    assert points.keys() == {"1", "2", "3", "4"}
    assert points["1"] == [(8.0, 96.5)] and points["2"] == [(6.0, 90.25)] and points["3"] == [(7.0, 88.0)]
    assert sorted(texts(figure)) == ["1", "2", "W4A4"]


def test_the_line_is_the_best_at_each_cost(sweep: SweepResults) -> None:
    figure = against(sweep, "size_bytes", LIGHT)
    assert figure is not None
    stairs = [line for line in figure.axes[0].get_lines() if len(line.get_xydata()) > 1]
    assert [list(map(tuple, line.get_xydata())) for line in stairs] == [[(6.0, 90.25), (8.0, 90.25), (8.0, 96.5)]]


def test_less_can_be_better_and_more_a_cost(sweep: SweepResults) -> None:
    """The loss is wanted low, the compression high: the line falls to the right, and steps the other way."""
    metrics = [{"loss": 0.2, "compression": 4.0}, {"loss": 0.5, "compression": 8.0}, {"loss": 0.9, "compression": 5.0}]
    trials = [replace(t, metrics=f) for t, f in zip(sweep.trials, metrics, strict=False)]
    other = SweepResults(sweep.folder, {}, trials, {"loss": "min", "compression": "max"})
    assert planes(other) == ["compression"]
    figure = against(other, "compression", LIGHT)
    assert figure is not None
    stairs = next(line for line in figure.axes[0].get_lines() if len(line.get_xydata()) > 1)
    assert list(map(tuple, stairs.get_xydata())) == [(4.0, 0.2), (4.0, 0.5), (8.0, 0.5)]


def test_a_collapsed_trial_does_not_press_the_others_together(sweep: SweepResults) -> None:
    collapsed = replace(sweep.trials[2], metrics={**sweep.trials[2].metrics, "top1": 10.0})
    trials = [collapsed if trial.id == collapsed.id else trial for trial in sweep.trials]
    figure = against(SweepResults(sweep.folder, sweep.config, trials, sweep.objectives), "size_bytes", LIGHT)
    assert figure is not None
    bottom, top = figure.axes[0].get_ylim()
    ((_, y),) = marked(figure.axes[0])["3"]
    assert bottom < y and bottom > 80 and top > 96.5
    legend = figure.axes[0].get_legend()
    assert legend is not None and "off the scale" in [text.get_text() for text in legend.get_texts()]


def test_the_worst_of_all_is_on_the_scale(sweep: SweepResults) -> None:
    figure = against(SweepResults(sweep.folder, sweep.config, sweep.trials[:3], sweep.objectives), "size_bytes", LIGHT)
    assert figure is not None
    legend = figure.axes[0].get_legend()
    assert legend is not None and "off the scale" not in [text.get_text() for text in legend.get_texts()]


def test_full_precision_is_a_line_where_it_is_known(sweep: SweepResults) -> None:
    known = [replace(t, metrics={**t.metrics, "fp_top1": 97.25}) for t in sweep.trials]
    figure = against(SweepResults(sweep.folder, sweep.config, known, sweep.objectives), "bops", LIGHT)
    assert figure is not None and "full precision 97.25 %" in texts(figure)


def test_nothing_finished_is_no_picture(sweep: SweepResults) -> None:
    stopped = SweepResults(sweep.folder, sweep.config, sweep.trials[3:5], sweep.objectives)
    assert all(plot.draw(stopped, LIGHT) is None for plot in plots(stopped) if plot.name != "parallel_coordinates")
    assert next(plots(SweepResults(sweep.folder, {}, [], sweep.objectives))).name == "layer_bits"  # there are no planes


def test_bits_of_layers_by_row(sweep: SweepResults) -> None:
    """Weights and inputs are alike here and drawn once: two models of six layers."""
    figure = layer_bits(sweep, LIGHT)
    assert figure is not None and len(figure.axes) == 1
    assert texts(figure) == [*"844448", *"844228"]
    different = [replace(t, layer_bits={name: [w, 8] for name, (w, _) in t.layer_bits.items()}) for t in sweep.trials]
    figure = layer_bits(SweepResults(sweep.folder, sweep.config, different, sweep.objectives), LIGHT)
    assert figure is not None and len(figure.axes) == 2
    assert texts(figure) == [*"844448", *"844228", *"888888", *"888888"]


def test_parallel_axes_are_what_differs(sweep: SweepResults) -> None:
    """Learning rate and objective are the same for all; of a knob with several parameters the mean; better is up."""
    figure = parallel(sweep, LIGHT)
    assert figure is not None
    headings = [text.get_text() for text in figure.axes[0].texts if text.get_fontweight() == "bold"]
    assert headings == ["widths, mean", "val top-1 %", "size, kB"]
    lines = marked(figure.axes[0])
    assert [y for _, y in lines["1"]] == [1.0, 1.0, 0.0]  # 4 bits, the most accurate, the largest
    assert [round(y, 6) for _, y in lines["2"]] == [0.5, round((90.25 - 70) / 26.5, 6), 0.5]


def test_a_knob_that_did_not_count_is_passed_below(sweep: SweepResults) -> None:
    def with_knob(trial: Trial, value: float | None) -> Trial:
        return replace(trial, knobs=trial.knobs | ({} if value is None else {"t": value}))

    trials = [with_knob(t, v) for t, v in zip(sweep.trials[:3], (1.0, None, 100.0), strict=True)]
    figure = parallel(SweepResults(sweep.folder, sweep.config, trials, sweep.objectives), LIGHT)
    assert figure is not None and "not set" in texts(figure)
    heights = {number: line[1][1] for number, line in marked(figure.axes[0]).items()}
    assert heights["1"] == 0 and heights["3"] == 1 and heights["2"] < 0


def test_curves_begin_after_the_first_epoch(sweep: SweepResults) -> None:
    assert sweep.curve(sweep.trials[0]) == [(1.0, 92.5), (2.0, 94.5), (3.0, 96.5)]
    figure = learning_curves(sweep, LIGHT)
    assert figure is not None
    lines = marked(figure.axes[0])
    assert lines.keys() == {"1", "2", "3", "4"} and len(lines["4"]) == 1
    assert sorted(texts(figure)) == ["1", "2"]


def test_curves_without_a_front_are_all_in_sight(sweep: SweepResults) -> None:
    """As of a sweep whose time was over before a trial had finished."""
    stopped = [replace(trial, status="stopped") for trial in sweep.trials if trial.status == "finished"]
    figure = learning_curves(SweepResults(sweep.folder, sweep.config, stopped, sweep.objectives), LIGHT)
    assert figure is not None
    (axes,) = figure.axes
    values = [y for points in marked(axes).values() for _, y in points]
    bottom, top = axes.get_ylim()
    assert values and bottom < min(values) and max(values) < top


def test_importance_is_one_panel_an_objective(sweep: SweepResults, monkeypatch: pytest.MonkeyPatch) -> None:
    shares = {"top1": {"optimizer.lr": 0.7, "widths.layer1.0": 0.3}, "size_bytes": {"widths.layer1.0": 1.0}}
    monkeypatch.setattr(SweepResults, "importance", lambda self, name: shares[name])
    figure = importance(sweep, LIGHT)
    assert figure is not None and len(figure.axes) == 2
    assert [[round(bar.get_width()) for bar in axes.patches] for axes in figure.axes] == [[70, 30], [0, 100]]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["lr", "widths.layer1.0"]
    monkeypatch.setattr(SweepResults, "importance", lambda self, name: {})
    assert importance(sweep, LIGHT) is None


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_a_png_has_the_colors_of_its_theme(sweep: SweepResults, theme: type) -> None:
    figure = against(sweep, "bops", theme)  # type: ignore[arg-type]
    assert figure is not None
    pixels = np.asarray(Image.open(BytesIO(png(figure))).convert("RGB"))
    for color in (theme.background, theme.series[0], theme.series[1]):  # type: ignore[attr-defined]
        wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        assert (pixels == wanted).all(axis=-1).sum() > 50


def test_an_svg_has_the_pages_colors_and_marks(sweep: SweepResults) -> None:
    figure = against(sweep, "bops", LIGHT)
    assert figure is not None
    text = svg(figure, "bops", LIGHT)
    assert not re.search(r"#[0-9a-f]{6}\b", text) and {"var(--c0)", "var(--front)", "var(--line)"} <= set(
        re.findall(r"var\(--\w+\)", text)
    )
    assert set(re.findall(r'data-mark="(\d+)"', text)) == {"1", "2", "3", "4"}
    assert "W4A4</text>" in text and "font-family" not in text and "<style" not in text
