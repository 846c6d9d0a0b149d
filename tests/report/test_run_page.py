"""The page of runs: it needs nothing else, and shows whole, unfinished and damaged runs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from hashlib import sha256
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qtrain.pipeline.summary import write_summary
from qtrain.report.chart import library
from qtrain.report.run_page import POINTS_OF_A_PAGE, write_report

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


def test_page_shows_finished_runs_and_lists_the_others(folder: Path) -> None:
    page, finished, unfinished = write_report(folder)
    text = page.read_text()
    assert (page, finished, unfinished) == (folder / "report.html", 2, 2)
    assert "96.75" in text and "95.25" in text and "layer1.0.conv1" in text
    reasons = text[text.index('id="problems"') :]
    assert "killed" in reasons and "unfinished" in reasons and "damaged" in reasons and "cannot be read" in reasons
    assert text.count("1 damaged line of") == 2


def test_layer_row_shows_the_last_health_metrics(folder: Path) -> None:
    with (folder / "w4-soft+hint" / "metrics.jsonl").open("a") as file:
        for step, error in ((5, 0.4), (6, 0.1234)):
            row = {"step": step, "split": "train", "error/layer1.0.conv1.weight": error, "dead/x.weight": 0.777}
            file.write("\n" + json.dumps(row))
    text = write_report(folder)[0].read_text()
    assert "W error %" in text and ">12.3<" in text
    assert ">40<" not in text and ">77.7<" not in text


def charts_of(text: str) -> dict[str, Any]:
    """The specs in the page ``text``, by name."""
    found, _ = json.JSONDecoder().raw_decode(text[text.index("const charts = ") + len("const charts = ") :])
    assert isinstance(found, dict)
    return found


def test_page_is_self_contained_and_well_formed(folder: Path) -> None:
    page = write_report(folder)[0].read_text()
    assert page.count(library()) == 1
    text = page.replace(library(), "")
    references = re.findall(r'(?:src|srcset|href)="([^"]*)"', text)
    assert references and all(ref.startswith("#") for ref in references) and "http" not in text

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


def test_plots_lie_beside_the_page_and_are_charts_in_it(folder: Path) -> None:
    text = write_report(folder)[0].read_text()
    for name in ("accuracy_vs_compression", "accuracy_vs_bops"):
        assert Image.open(BytesIO((folder / f"{name}.png").read_bytes())).size == (1200, 750)
        kinds = {row.get("kind") for rows in charts_of(text)[name]["datasets"].values() for row in rows}
        assert {"trained with teacher", "trained without teacher"} <= kinds
    places = re.findall(r'data-chart="([^"]*)"', text)
    assert sorted(places) == sorted(charts_of(text)) and len(places) == 4


def test_page_of_many_long_runs_is_below_2_mb(tmp_path: Path) -> None:
    """Twenty runs of twenty layers, whose curves have 120,000 points."""
    rows = [
        {"step": step, "split": "train", "total": 0.123456789} | {f"error/layer{n}.weight": 0.987654 for n in range(19)}
        for step in range(300)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    for number in range(20):
        write_summary(tmp_path / f"r{number}", fields(4, "none", 95.0, seed=number, layers=[LAYER] * 20))
        (tmp_path / f"r{number}" / "metrics.jsonl").write_text(lines)
    page = write_report(tmp_path)[0]
    assert page.stat().st_size < 2_000_000
    charts = charts_of(page.read_text())
    drawn = sum(
        len(row["step"])
        for made in charts.values()
        for rows in made["datasets"].values()
        for row in rows
        if "step" in row
    )
    assert 0.5 * POINTS_OF_A_PAGE < drawn <= POINTS_OF_A_PAGE


@pytest.mark.parametrize("dark", [False, True])
def test_page_draws_its_charts_in_a_browser_without_an_error(
    folder: Path, browser: Callable[..., Any], dark: bool
) -> None:
    """Charts of a run are drawn when the run is opened; all columns of the table are in sight."""
    script = """
      const before = document.querySelectorAll(".chart svg").length;
      for (const run of document.querySelectorAll("details")) run.open = true;
      await new Promise(resolve => setTimeout(resolve, 3000));
      const wide = [...document.querySelectorAll(".wide")].map(part => part.scrollWidth - part.clientWidth);
      const dot = document.querySelector('.chart svg path[aria-label*="trained with teacher"]');
      return [before, document.querySelectorAll(".chart svg").length, Math.max(...wide), getComputedStyle(dot).fill];
    """
    shown = browser(write_report(folder)[0], script, dark=dark)
    assert shown.console == []
    before, after, overflow, fill = shown.result
    assert (before, after, overflow) == (2, 4, 0)
    assert fill == ("rgb(108, 176, 255)" if dark else "rgb(11, 98, 196)")


def layer(name: str, elements: int, differing: int, cause: str, steps: int = 1) -> dict[str, Any]:
    return {"layer": name, "elements": elements, "differing": differing, "steps": steps if differing else 0,
            "ties": differing, "biased": 0, "fused": 0, "saturated": 0, "cause": cause}  # fmt: skip


def verdict(**changes: Any) -> dict[str, Any]:
    """A ``verify.json`` of two layers and three comparisons."""
    tiers = [
        {"name": "constants", "faults": [], "first": None, "disagreeing": [], "layers": []},
        {"name": "reference", "faults": [], "first": None, "disagreeing": [],
         "layers": [layer("conv1", 3200, 0, ""), layer("fc", 640, 0, "")]},
        {"name": "onnxruntime", "faults": [], "first": "conv1",
         "disagreeing": [{"image": 3, "cause": "conv1: 4 ties at a half", "explained": True}],
         "layers": [layer("conv1", 3200, 4, "4 ties at a half"), layer("fc", 640, 1, "1 <by> biases in 32 bits")]},
    ]  # fmt: skip
    found = {"passed": True, "images": 50, "compared_on": "test images", "test_images": 360, "tiers": tiers,
             "top1": {"student": 96.75, "onnxruntime": 96.5}}  # fmt: skip
    return found | changes


def exported(run: Path, content: str) -> None:
    (run / "export").mkdir()
    (run / "export" / "verify.json").write_text(content)


def test_export_of_a_run_is_a_table_of_layers_and_a_picture(folder: Path) -> None:
    exported(folder / "w4-none", json.dumps(verdict()))
    text = write_report(folder)[0].read_text()
    assert text.count("<h3>Export</h3>") == 1
    assert "<b>Verified.</b>" in text
    assert "Top-1 on 360 images: student 96.75 %, onnxruntime 96.50 %" in text
    assert ">4 by 1 step: 4 ties at a half<" in text and ">1 by 1 step: 1 &lt;by&gt; biases in 32 bits<" in text
    (made,) = (chart for name, chart in charts_of(text).items() if name.endswith("-export"))
    (cells,) = made["datasets"].values()
    assert [(cell["comparison"], cell["layer"], cell["text"]) for cell in cells] == [
        ("reference", "conv1", ""), ("reference", "fc", ""), ("onnxruntime", "conv1", "4"), ("onnxruntime", "fc", "1"),
    ]  # fmt: skip
    strength = {cell["layer"]: cell["strength"] for cell in cells if cell["comparison"] == "onnxruntime"}
    assert 0 < strength["conv1"] < strength["fc"] < 1  # 4 of 3200, and 1 of 640


def test_export_that_does_not_compute_what_was_trained_says_so(folder: Path) -> None:
    found = verdict(passed=False)
    found["tiers"][0]["faults"] = ["conv1.weight.codes: 1 of its bytes are not the student's", "fc: another"]
    exported(folder / "w4-none", json.dumps(found))
    text = write_report(folder)[0].read_text()
    assert "<b>Not what was trained.</b>" in text
    assert "conv1.weight.codes: 1 of its bytes are not the student&#39;s (and 1 more)" in text


def test_export_of_an_earlier_student_of_the_run_is_not_shown(folder: Path) -> None:
    run = folder / "w4-none"
    (run / "student.safetensors").write_bytes(b"new")
    own = {name: sha256(name.encode()).hexdigest() for name in ("new", "old")}
    exported(run, json.dumps(verdict(student=own["old"])))
    text = write_report(folder)[0].read_text()
    assert "export is of an earlier student of this run; task=export writes it anew" in text
    assert "Verified" not in text
    (run / "export" / "verify.json").write_text(json.dumps(verdict(student=own["new"])))
    assert "<b>Verified.</b>" in write_report(folder)[0].read_text()


def test_a_page_holds_names_that_utf8_does_not(tmp_path: Path) -> None:
    write_summary(tmp_path / "a", fields(4, "none", 95.0, model="caf\udce9"))
    assert "caf?" in write_report(tmp_path)[0].read_text(encoding="utf-8")


@pytest.mark.parametrize("content", ["{", "[]", '{"tiers": [{}]}', '{"tiers": 3}'])
def test_damaged_verdict_is_named_and_the_rest_shown(folder: Path, content: str) -> None:
    exported(folder / "w4-none", content)
    text = write_report(folder)[0].read_text()
    assert "export/verify.json cannot be read" in text and "task=verify writes it anew" in text
    assert "layer1.0.conv1" in text


def test_each_width_of_a_student_of_many_bits_is_a_row_and_a_point(tmp_path: Path) -> None:
    widths = {
        f"w{bits}": {"w_bits": bits, "a_bits": bits, "top1": top1, "compression": 32 / bits, "bops": 700_000 * bits**2}
        for bits, top1 in ((8, 97.25), (4, 91.75), (2, 71.5))
    }
    write_summary(tmp_path / "many", fields(8, "none", 97.25, widths=widths))
    text = write_report(tmp_path)[0].read_text()
    for bits, top1 in ((8, "97.25"), (4, "91.75"), (2, "71.50")):
        assert text.count(f">{top1}<") == 2  # in the closing table and in that of the runs
        assert f"W{bits}A{bits} {top1} %" in text  # in the heading of its section
    assert "1 finished run." in text and text.count("<details") == 1
    for name in ("accuracy_vs_compression", "accuracy_vs_bops"):
        rows = {
            (row["x"], row["y"]) for rows in charts_of(text)[name]["datasets"].values() for row in rows if "x" in row
        }
        factor = 1 if name == "accuracy_vs_compression" else 2  # bit operations fall with the square
        assert {((32 / bits) ** factor, top1) for bits, top1 in ((8, 97.25), (4, 91.75), (2, 71.5))} <= rows


def test_names_are_escaped(tmp_path: Path) -> None:
    write_summary(tmp_path / "a", fields(4, "none", 95.0, model="<script>alert(1)</script>"))
    text = write_report(tmp_path)[0].read_text()
    assert "<script>alert" not in text and "&lt;script&gt;alert" in text


def test_damaged_runs_alone_have_a_page(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "summary.json").write_text("")
    page, finished, unfinished = write_report(tmp_path)
    assert (finished, unfinished) == (0, 1) and "cannot be read" in page.read_text()
    assert not (tmp_path / "accuracy_vs_compression.png").exists()


def test_runs_that_no_picture_can_show_have_none_but_a_table(tmp_path: Path) -> None:
    """A teacher alone is a line without a point, and a run that does not know its bit operations has no place there."""
    write_summary(tmp_path / "a", fields(4, "none", 95.0))
    write_report(tmp_path)
    write_summary(tmp_path / "a", fields(4, "none", 95.0, bops=None))
    text = write_report(tmp_path)[0].read_text()
    assert not (tmp_path / "accuracy_vs_bops.png").exists() and (tmp_path / "accuracy_vs_compression.png").exists()
    assert "Accuracy against bit operations" not in text and "Accuracy against compression" in text
    write_summary(tmp_path / "a", fields(32, "none", 97.5, fp_top1=None, ptq_top1=None))
    text = write_report(tmp_path)[0].read_text()
    assert list(tmp_path.glob("*.png")) == [] and "Accuracy against" not in text
    assert "Full precision, calibrated, trained, distilled" in text and ">97.50<" in text


def test_run_with_few_metrics_is_shown(tmp_path: Path) -> None:
    write_summary(
        tmp_path / "a", {"top1": 50.0, "w_bits": "mixed", "layers": [{"name": "conv1", "shape": 5}, "no row"]}
    )
    text = write_report(tmp_path)[0].read_text()
    assert "mixed" in text and "conv1" in text and "no metrics.jsonl" in text


def test_second_report_does_not_count_the_first(folder: Path) -> None:
    first = write_report(folder)
    assert write_report(folder)[1:] == first[1:]


def test_folder_without_runs_is_named_in_the_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"report\.folder: no run below"):
        write_report(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*absent"):
        write_report(tmp_path / "absent")
