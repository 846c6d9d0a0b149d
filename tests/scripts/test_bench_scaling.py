"""How a step's cost grows along an axis, and its picture. No assertion on time."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from qtrain.pipeline.results import read_results
from tests.helpers.script import load_script

TINY = ["--batch", "2", "--size", "8", "--rounds", "1", "--steps", "1", "model=cifar_resnet8", "model.width=0.25"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = load_script("bench_scaling")
    few = {"images": {"2": (), "4": ()}, "bits": {"3": ("quantize.bits.weight=3",)}}
    widths = {"parameters": {f"width {w}": (f"model.width={w}",) for w in (0.25, 0.5)}}
    depths = {"quantizers": {f"{n} layers": (f"model=cifar_resnet{n}", "model.width=0.25") for n in (8, 20)}}
    for axis, points in {**few, **widths, **depths}.items():
        monkeypatch.setitem(module.POINTS, axis, points)
    return module


def test_each_point_has_full_precision_and_the_student_in_its_place(script: ModuleType, tmp_path: Path) -> None:
    csv = tmp_path / "scaling.csv"
    assert script.main([*TINY, "--results", str(csv)]) == 0
    rows = read_results(csv)
    assert [row["case"] for row in rows] == ["full precision", "student"] * 7
    places = [(row["axis"], row["name"]) for row in rows[::2]]
    assert places == [
        ("images", "2"), ("images", "4"), ("parameters", "width 0.25"), ("parameters", "width 0.5"),
        ("quantizers", "8 layers"), ("quantizers", "20 layers"), ("bits", "3"),
    ]  # fmt: skip
    at = {row["name"]: int(row["at"]) for row in rows}
    assert at["2"] == 2 and at["3"] == 3
    assert at["20 layers"] - at["8 layers"] == 2 * 12, "two quantizers, of weight and input, for each layer more"
    assert 3 < at["width 0.5"] / at["width 0.25"] < 4, "almost all parameters are in products of two widths"
    assert all(float(row["ratio"]) > 0 for row in rows[1::2]) and not any(row["ratio"] for row in rows[::2])

    picture = tmp_path / "scaling.png"
    assert load_script("plot_scaling").main([str(csv), str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_panels_show_the_last_measurement_of_each_point(script: ModuleType) -> None:
    def row(at: int, case: str, ms: float) -> dict[str, str]:
        return {"axis": "images", "at": str(at), "case": case, "step_ms": str(ms)}

    rows = [row(32, "student", 9), row(16, "student", 4), row(16, "full precision", 3), row(32, "student", 8)]
    figure = load_script("plot_scaling").draw(rows)
    (panel,) = figure.axes
    lines = {str(line.get_label()): [tuple(xy) for xy in line.get_xydata()] for line in panel.lines}
    assert lines == {"student": [(16, 4), (32, 8)], "full precision": [(16, 3)]}
    assert panel.get_xlim()[0] == panel.get_ylim()[0] == 0


def test_it_has_smaller_defaults_than_other_benchmarks(script: ModuleType) -> None:
    options = script.parse([])
    assert (options.batch, options.steps, options.rounds) == (64, 2, 9)
    assert script.parse(["--steps", "5"]).steps == 5


def test_a_wrong_axis_or_override_is_one_line(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        script.main(["--axes", "depth"])
    assert "invalid choice: 'depth'" in capsys.readouterr().err
    assert script.main([*TINY, "fit.epoch=3"]) == 2
    assert capsys.readouterr().err.startswith("bench_scaling: error: unknown key 'fit.epoch'")
