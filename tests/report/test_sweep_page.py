"""The page of a sweep: what it says, that it needs nothing else, and that it works in a browser."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qtrain.config.compose import compose
from qtrain.config.experiment_file import as_experiment
from qtrain.pipeline.summary import gather
from qtrain.report.chart import library
from qtrain.report.run_page import write_report
from qtrain.report.sweep_page import rests_on, tiles, write_sweep_report
from qtrain.sweep.sweep_results import read_sweep
from qtrain.sweep.trial import read_trials
from qtrain.tasks.report import run


@pytest.fixture
def page(swept: Path) -> Path:
    return swept / "sweep.html"


def test_folder_gets_page_pictures_front_and_table(page: Path) -> None:
    assert page.name == "sweep.html"
    there = {path.relative_to(page.parent).as_posix() for path in page.parent.rglob("*") if path.is_file()}
    assert {
        "sweep.html", "pareto.csv", "front/p1.yaml", "front/p2.yaml", "top1_vs_size_bytes.png", "top1_vs_bops.png",
        "layer_bits.png", "parallel_coordinates.png", "learning_curves.png",
    } <= there  # fmt: skip
    with (page.parent / "pareto.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["point"], row["trial"], row["top1"], row["size_bytes"]) for row in rows] == [
        ("1", "0001", "96.5", "8000.0"), ("2", "0002", "90.25", "6000.0")
    ]  # fmt: skip


def test_page_shows_how_each_trial_ended(page: Path) -> None:
    text = page.read_text()
    assert "6 trials: 3 finished, 1 stopped, 1 failed, 1 duplicate." in text
    assert "the same config as trial 1" in text and "by the scheduler" in text
    assert "the loss is &lt;nan&gt; at step 7" in text and "<nan>" not in text


def test_tiles_summarize_the_sweep(sweep_folder: Path) -> None:
    """3 + 3 + 3 + 1 + 1 epochs were trained of 6 x 3; four runs, of overheads 0.25 s each; 1000 s to 5040 s."""
    assert tiles(read_sweep(sweep_folder)) == [
        ("best val top-1 %", "96.50", "size 8.0 kB, 0.032 GBOPs"),
        ("on the front", "2", "of 3 trained to their end"),
        ("epochs spent", "11", "61% of full training of all trials"),
        ("overhead of a trial", "0.25 s", "median, beyond its training"),
        ("memory of a worker", "1.6 GB", "at most"),
        ("time", "3:20", "in which trials ran"),
    ]


def test_page_says_how_many_images_and_seeds_it_rests_on(page: Path, sweep_folder: Path) -> None:
    """Two accuracies of 96.5 % on 360 images differ by sqrt(2 96.5 3.5 / 360) = 1.37 points, twice that 2.74."""
    said = (
        "Val top-1 is of 360 images that no trial trained on; each model was trained once, with seed 0. Near the best, "
        "differences below 2.74 points are less than two standard errors."
    )
    sweep = read_sweep(sweep_folder)
    assert rests_on(sweep) == said and said in page.read_text()
    tested = [
        replace(t, metrics=t.metrics | {"test_top1": 90.0}, knobs={"seed": n}) for n, t in enumerate(sweep.trials)
    ]
    text = rests_on(replace(sweep, trials=tested))
    assert (
        "; test top-1 of 1,200 test images; each model was trained once, with seed 0 or 1 or 2 or 3 or 4 or 5." in text
    )
    unknown = [replace(trial, images={}) for trial in sweep.trials]
    assert rests_on(replace(sweep, trials=unknown)) == "", "trials of an earlier version"


def test_page_needs_nothing_else_and_is_below_2_mb(page: Path) -> None:
    assert page.stat().st_size < 2_000_000
    text = page.read_text()
    assert text.count(library()) == 1
    text = text.replace(library(), "")
    references = re.findall(r'(?:src|srcset|href)="([^"]*)"', text)
    ids = re.findall(r' id="([^"]*)"', text)
    assert len(ids) == len(set(ids)) and {reference.removeprefix("#") for reference in references} <= set(ids)
    assert "http" not in text and "url(" not in text


def test_second_page_replaces_the_files_of_the_first(sweep_folder: Path) -> None:
    """Made anew with fewer trials it has fewer points, and nothing of the old ones is left."""
    write_sweep_report(sweep_folder, as_experiment=as_experiment)
    assert len(list((sweep_folder / "front").iterdir())) == 2
    lines = (sweep_folder / "trials.jsonl").read_text().splitlines()
    (sweep_folder / "trials.jsonl").write_text(lines[0] + "\n")
    text = write_sweep_report(sweep_folder, as_experiment=as_experiment).read_text()
    assert [path.name for path in (sweep_folder / "front").iterdir()] == ["p1.yaml"]
    assert not (sweep_folder / "parallel_coordinates.png").exists() and "90.25" not in text


def test_sweep_of_failed_trials_has_a_page(sweep_folder: Path) -> None:
    failed = [line for line in (sweep_folder / "trials.jsonl").read_text().splitlines() if '"failed"' in line]
    (sweep_folder / "trials.jsonl").write_text(failed[0] + "\n")
    text = write_sweep_report(sweep_folder, as_experiment=as_experiment).read_text()
    assert "1 trial: 1 failed." in text and "at step 7" in text and "The front</h2>" not in text


def test_sweep_without_its_config_has_a_page(sweep_folder: Path) -> None:
    (sweep_folder / "sweep.yaml").unlink()
    first, *_ = (sweep_folder / "trials.jsonl").read_text().splitlines()
    (sweep_folder / "trials.jsonl").write_text(first + "\n")
    assert "a sweep" in write_sweep_report(sweep_folder, as_experiment=as_experiment).read_text()


@pytest.mark.parametrize("content", ["a: [", "- a list"])
def test_damaged_config_is_an_error(sweep_folder: Path, content: str) -> None:
    (sweep_folder / "sweep.yaml").write_text(content)
    with pytest.raises(ValueError, match=r"sweep\.yaml (cannot be read|holds a list)"):
        write_sweep_report(sweep_folder, as_experiment=as_experiment)


def test_folder_without_a_sweep_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no sweep in"):
        write_sweep_report(tmp_path, as_experiment=as_experiment)


def test_task_report_shows_a_sweep(sweep_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = run(compose([f"report.folder={sweep_folder}".replace(" ", "\\ "), "task=report"]))
    assert metrics == {"report": str(sweep_folder / "sweep.html"), "trials": 6, "front": 2}
    printed = capsys.readouterr().out
    assert "96.50" in printed and "90.25" in printed and "88.00" not in printed and "sweep.html" in printed


def test_report_of_the_parent_folder_leaves_out_trials(sweep_folder: Path) -> None:
    runs, problems = gather(sweep_folder.parent)
    assert (runs, problems) == ([], [])
    with pytest.raises(FileNotFoundError, match="no run below"):
        write_report(sweep_folder.parent)
    assert len(gather(sweep_folder / "trials")[1]) == 4


SORT = """
  const table = document.getElementById("all");
  const column = name => [...table.tHead.rows[0].cells].find(cell => cell.textContent === name);
  const order = () => [...table.tBodies[0].rows].map(row => row.dataset.mark).join("");
"""


def test_table_sorts_in_a_browser(page: Path, browser: Callable[..., Any]) -> None:
    script = (
        SORT
        + """
      const orders = [order()];
      for (const name of ["val top-1 %", "val top-1 %", "Status", "size"]) {
        column(name).querySelector("button").click();
        orders.push(order());
      }
      return [orders, column("size").getAttribute("aria-sort")];
    """
    )
    shown = browser(page, script)
    assert shown.console == []
    orders, direction = shown.result
    # The failed trial, 5, has no accuracy and is last in both directions; its bits are known, so its size is.
    assert orders[:3] == ["123456", "162345", "432165"]
    assert orders[3] == "653214"  # duplicate, failed, finished as they stood, stopped
    sizes = {str(n): t.metrics.get("size_bytes", 0) for n, t in enumerate(read_trials(page.parent), start=1)}
    assert [sizes[mark] for mark in orders[4]] == sorted(sizes.values(), reverse=True) and direction == "descending"


def test_table_is_filtered_in_a_browser(page: Path, browser: Callable[..., Any]) -> None:
    script = (
        SORT
        + """
      const visible = () => [...table.tBodies[0].rows].filter(row => !row.hidden).map(row => row.dataset.mark).join("");
      const turn = (id, value) => {
        const part = document.querySelector(id);
        part[typeof value === "string" ? "value" : "checked"] = value;
        part.dispatchEvent(new Event("input"));
        return visible();
      };
      return [turn("#search", "nan step"), turn("#search", ""), turn("#only-front", true), turn("#only-front", false),
        turn("input.status[value=finished]", false), document.getElementById("shown").textContent];
    """
    )
    assert browser(page, script).result == ["5", "123456", "12", "123456", "456", "3 of 6"]


def test_point_names_its_trial_marks_it_everywhere_and_leads_to_its_row(
    page: Path, browser: Callable[..., Any]
) -> None:
    script = """
      const point = document.querySelector('[data-chart="top1_vs_size_bytes"] path[aria-label*="tip: 2"]');
      const send = async name => {
        const {x, y} = point.getBoundingClientRect();
        point.dispatchEvent(new PointerEvent(name, {bubbles: true, clientX: x, clientY: y}));
        await new Promise(resolve => setTimeout(resolve, 500));
      };
      const stroke = 'path[stroke="var(--c1)"]';
      const orange = () => [...document.querySelectorAll(".chart")]
        .filter(chart => chart.querySelector(["symbol", "line", "rect"].map(mark => `.mark-${mark} ${stroke}`).join()))
        .map(chart => chart.dataset.chart);
      await send("mouseover");
      await send("pointermove");
      const tip = document.getElementById("vg-tooltip-element");
      const said = [tip.textContent, getComputedStyle(tip).display];
      const marked = [orange(), [...document.querySelectorAll("tr.chosen")].map(row => row.dataset.mark)];
      await send("mouseout");
      return [...said, ...marked, orange(), document.querySelectorAll("tr.chosen").length];
    """
    text, display, charts, rows, orange_left, rows_left = browser(page, script).result
    assert text.splitlines()[0] == "Trial 2, point 2 of the front" and "size 6.0 kB" in text and display == "block"
    everywhere = {"top1_vs_size_bytes", "top1_vs_bops", "layer_bits", "parallel_coordinates", "learning_curves"}
    assert set(charts) == everywhere and set(rows) == {"2"}
    assert orange_left == [] and rows_left == 0


@pytest.mark.parametrize("dark", [False, True])
def test_page_and_its_charts_are_light_or_dark(
    page: Path, browser: Callable[..., Any], tmp_path: Path, dark: bool
) -> None:
    picture = tmp_path / "screen.png"
    shown = browser(page, dark=dark, screenshot=picture)
    assert shown.console == []
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    ground, blue = ((20, 23, 28), (108, 176, 255)) if dark else ((255, 255, 255), (11, 98, 196))
    assert tuple(pixels[2, 2]) == ground
    assert (pixels == ground).all(axis=-1).mean() > 0.8  # no picture brings a ground of the other theme
    assert (pixels == blue).all(axis=-1).sum() > 100  # the front's points


def test_tips_are_json_by_trial_number(page: Path) -> None:
    found = re.search(r"tips = (\{.*\});", page.read_text())
    assert found and set(json.loads(found[1])) == {"1", "2", "3", "4", "5", "6"}
