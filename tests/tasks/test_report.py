"""The report: one page that needs nothing else, from whole, unfinished and damaged runs."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from io import BytesIO
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from qtrain.config.compose import compose
from qtrain.pipeline.summary import RunSummary, write_summary
from qtrain.report.canvas import DARK, LIGHT, place_labels
from qtrain.report.run_plots import BIT_OPERATIONS, COMPRESSION, accuracy_plot
from qtrain.report.table import outcomes
from qtrain.tasks.report import run, write_report

LAYER = {
    "name": "layer1.0.conv1", "kind": "conv2d", "shape": [16, 16, 3, 3], "weights": 2304, "macs": 147456,
    "weight_bits": 4, "input_bits": 4, "weight_storage_bits": 9248, "input_storage_bits": 32, "effective_bits": 4.01,
    "bops": 2359296,
}  # fmt: skip


def fields(bits: int, distill: str, top1: float, **changes: Any) -> dict[str, Any]:
    return dict(
        experiment="quickstart", name=f"w{bits}", dataset="digits", model="cifar_resnet8", quantizer="lsq",
        w_bits=bits, a_bits=bits, distill=distill, seed=0, epochs=3, top1=top1, fp_top1=97.5, ptq_top1=top1 - 20,
        size_bytes=10_000 * bits, fp_size_bytes=320_000, compression=32 / bits, effective_bits=bits + 0.1, macs=700_000,
        bops=700_000 * bits * bits, fp_bops=700_000 * 1024, step_ms=9.0, wall_s=12.0, status="finished", layers=[LAYER],
    ) | changes  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two finished runs, one killed in training, one with a damaged summary."""
    root = tmp_path / "quickstart"
    for bits, distill, top1 in ((4, "none", 95.25), (4, "soft+hint", 96.75)):
        place = root / f"w{bits}-{distill}"
        write_summary(place, fields(bits, distill, top1))
        rows = [{"step": s, "epoch": 0, "time": 0.0, "split": "train", "total": 3.0 / (s + 1)} for s in range(20)]
        (place / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"step": 20, "tot')
    (root / "killed").mkdir()
    (root / "killed" / "metrics.jsonl").write_text('{"step": 1}\n')
    (root / "damaged").mkdir()
    (root / "damaged" / "summary.json").write_bytes(b"\xff\xfe{")
    return root


def test_the_page_shows_finished_runs_and_lists_the_others(folder: Path) -> None:
    page, finished, unfinished = write_report(folder)
    text = page.read_text()
    assert (page, finished, unfinished) == (folder / "report.html", 2, 2)
    assert "96.75" in text and "95.25" in text and "layer1.0.conv1" in text and "<path d=" in text
    reasons = text[text.index('id="problems"') :]
    assert "killed" in reasons and "unfinished" in reasons and "damaged" in reasons and "cannot be read" in reasons
    assert text.count("1 damaged line of") == 2


def test_a_layers_row_shows_its_health_as_it_was_last(folder: Path) -> None:
    with (folder / "w4-soft+hint" / "metrics.jsonl").open("a") as file:
        for step, error in ((5, 0.4), (6, 0.1234)):
            row = {"step": step, "split": "train", "error/layer1.0.conv1.weight": error, "dead/x.weight": 0.777}
            file.write("\n" + json.dumps(row))
    text = write_report(folder)[0].read_text()
    assert "W error %" in text and ">12.3<" in text
    assert ">40<" not in text and ">77.7<" not in text


def test_the_page_is_self_contained_and_well_formed(folder: Path) -> None:
    text = write_report(folder)[0].read_text()
    references = re.findall(r'(?:src|srcset|href)="([^"]*)"', text)
    assert references and all(ref.startswith(("data:image/png;base64,", "#")) for ref in references)
    assert "http" not in re.sub(r"base64,[^\"]*", "", text)

    class Balance(HTMLParser):
        open: list[str] = []  # noqa: RUF012 - one instance

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag not in ("meta", "img", "source"):
                self.open.append(tag)

        def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            pass

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag, tag

    parser = Balance()
    parser.feed(text)
    assert parser.open == []
    anchors = set(re.findall(r'id="([^"]*)"', text))
    assert {ref[1:] for ref in references if ref.startswith("#")} <= anchors


def test_the_plots_lie_beside_the_page_and_inside_it(folder: Path) -> None:
    text = write_report(folder)[0].read_text()
    for name in ("accuracy_vs_compression.png", "accuracy_vs_bops.png"):
        png = (folder / name).read_bytes()
        assert Image.open(BytesIO(png)).size == (1200, 750)
        assert base64.b64encode(png).decode() in text


def test_names_are_text_and_not_markup(tmp_path: Path) -> None:
    write_summary(tmp_path / "a", fields(4, "none", 95.0, model="<script>alert(1)</script>"))
    text = write_report(tmp_path)[0].read_text()
    assert "<script>alert" not in text and "&lt;script&gt;alert" in text


def test_only_damaged_runs_still_make_a_page(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "summary.json").write_text("")
    page, finished, unfinished = write_report(tmp_path)
    assert (finished, unfinished) == (0, 1) and "cannot be read" in page.read_text()
    assert not (tmp_path / "accuracy_vs_compression.png").exists()


def test_a_run_with_little_to_say_is_shown(tmp_path: Path) -> None:
    write_summary(tmp_path / "a", {"top1": 50.0, "w_bits": "mixed", "layers": [{"name": "conv1"}, "no row"]})
    text = write_report(tmp_path)[0].read_text()
    assert "mixed" in text and "conv1" in text and "no metrics.jsonl" in text


def test_a_second_report_does_not_count_the_first(folder: Path) -> None:
    first = write_report(folder)
    assert write_report(folder)[1:] == first[1:]


def test_a_folder_without_runs_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"report\.folder: no run below"):
        write_report(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*absent"):
        write_report(tmp_path / "absent")


def test_the_task_prints_where_the_page_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = run(compose(["task=report", f"report.folder={folder}"]))
    assert metrics == {"report": str(folder / "report.html"), "runs": 2, "unfinished": 2}
    printed = capsys.readouterr().out
    assert "distilled (soft+hint)" in printed and f"report: {folder / 'report.html'}" in printed


def test_labels_keep_clear_of_each_other_and_of_the_points() -> None:
    axes = Figure(figsize=(8, 5), dpi=150).add_subplot()
    axes.set_xlim(0, 10)
    axes.set_ylim(0, 10)
    points = [(5.0 + 0.1 * i, 5.0 + 0.05 * i) for i in range(6)]
    axes.plot(*zip(*points, strict=True), marker="o", linestyle="None")
    boxes = place_labels(axes, [(f"W{i}A{i}", x, y, "black") for i, (x, y) in enumerate(points)])
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    markers = axes.transData.transform(points)
    assert not any(box.contains(x, y) for box in boxes for x, y in markers)


def test_distilled_points_are_filled_and_others_open() -> None:
    """Two plots that differ only in whether a teacher helped differ in the ink at the point."""
    plots = [outcomes([RunSummary(**fields(4, distill, 95.0, ptq_top1=None))]) for distill in ("none", "soft")]
    ink = [_colored(accuracy_plot(rows, COMPRESSION)) for rows in plots]
    assert ink[1] > ink[0] + 100


@pytest.mark.parametrize("axis", [COMPRESSION, BIT_OPERATIONS])
@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_a_plot_has_the_ground_of_its_theme(axis: Any, theme: Any) -> None:
    rows = outcomes([RunSummary(**fields(2, "none", 60.0)), RunSummary(**fields(8, "soft", 97.0, bops=None))])
    image = Image.open(BytesIO(accuracy_plot(rows, axis, theme))).convert("RGB")
    assert "#{:02x}{:02x}{:02x}".format(*image.getpixel((2, 2))) == theme.background


def _colored(png: bytes) -> int:
    """Pixels in the first series' color within the plot, the legend below left out."""
    image = Image.open(BytesIO(png)).convert("RGB").crop((0, 0, 1200, 640))
    wanted = tuple(int(LIGHT.series[0][i : i + 2], 16) for i in (1, 3, 5))
    return int((np.asarray(image) == wanted).all(axis=-1).sum())
