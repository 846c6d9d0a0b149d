"""What PNGs have in common: labels that keep apart, colors that the page shares."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

from PIL import Image

from qtrain.report.figure import COLORS, GRID, INK, add_labels, new_figure, write_png
from qtrain.report.html import TEMPLATES


def test_labels_keep_clear_of_each_other_and_of_the_points() -> None:
    axes = new_figure().add_subplot()
    axes.set(xlim=(0, 10), ylim=(0, 10))
    points = [(5.0 + 0.25 * i, 5.0 + 0.15 * i) for i in range(6)]
    axes.plot(*zip(*points, strict=True), marker="o", linestyle="None")
    add_labels(axes, [(f"W{i}A{i}", x, y, INK) for i, (x, y) in enumerate(points)], [(x, y, 6.0) for x, y in points])
    boxes = [text.get_window_extent() for text in axes.texts if text.get_text()]
    assert len(boxes) == 6 and not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    markers = axes.transData.transform(points)
    assert not any(box.contains(x, y) for box in boxes for x, y in markers)


def test_without_labels_nothing_is_written() -> None:
    axes = new_figure().add_subplot()
    add_labels(axes, [])
    assert not axes.texts


def test_png_has_150_pixels_an_inch(tmp_path: Path) -> None:
    write_png(new_figure(width=2, height=1), tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size == (300, 150)


def test_page_has_the_colors_of_the_pngs() -> None:
    style = (TEMPLATES / "page.css").read_text()
    light = style[: style.index("@media")]
    assert all(f"--c{place}: {color};" in light for place, color in enumerate(COLORS))
    assert f"--front: {INK};" in light and f"--line: {GRID};" in light
