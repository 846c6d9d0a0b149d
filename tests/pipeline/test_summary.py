"""Summaries of runs, the runs below a folder, and the closing table."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from qtrain.pipeline.run_folder import typical_bits
from qtrain.pipeline.summary import FINISHED, RunSummary, gather, read_summary, write_summary
from qtrain.report.seed_groups import seed_groups
from qtrain.report.table import COLUMNS, closing_table, plain_table, print_summary, size_text, table_rows
from qtrain.spec import LayerBits


def fields(**changes: Any) -> dict[str, Any]:
    """A finished W4A4 run on digits, with ``changes``."""
    common = dict(
        experiment="quickstart", name="w4a4", dataset="digits", model="cifar_resnet8", quantizer="lsq",
        w_bits=4, a_bits=4, distill=False, seed=0, epochs=20, top1=95.0, fp_top1=97.5, ptq_top1=60.0,
        size_bytes=43_000, fp_size_bytes=315_000, compression=7.33, effective_bits=4.4, macs=700_000,
        bops=11_200_000, fp_bops=716_800_000, step_ms=9.1, wall_s=12.0, status=FINISHED,
    )  # fmt: skip
    return common | changes


def summary(**changes: Any) -> RunSummary:
    return RunSummary(**fields(**changes))


def test_a_summary_comes_back(tmp_path: Path) -> None:
    path = write_summary(tmp_path / "run", fields(layers=[{"name": "conv1", "weight_bits": 4}]))
    assert path == tmp_path / "run" / "summary.json"
    assert read_summary(path) == summary(layers=[{"name": "conv1", "weight_bits": 4}])


def test_what_is_unknown_or_not_finite_is_null(tmp_path: Path) -> None:
    path = write_summary(tmp_path, {"name": "a", "top1": float("nan")})
    content = json.loads(path.read_text())
    assert content["top1"] is None and content["fp_top1"] is None
    assert set(content) >= {"experiment", "w_bits", "status", "layers"}


def test_a_misspelt_field_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="top_1"):
        write_summary(tmp_path, {"top_1": 90.0})


WIDTHS = {
    "w8": {"w_bits": 8, "a_bits": 8, "top1": 97.0, "ptq_top1": 96.0, "size_bytes": 80, "compression": 4.0, "bops": 400},
    "w4": {"w_bits": 4, "a_bits": 4, "top1": 95.0, "ptq_top1": 60.0, "size_bytes": 40, "compression": 8.0, "bops": 100},
}


def test_a_student_of_many_bits_is_a_summary_of_each_width() -> None:
    wide = {**WIDTHS["w8"], "file_bytes": 99, "right": "8:ff"}
    found = summary(**wide, widths=WIDTHS).by_width()
    assert [(one.bits, one.top1, one.size_bytes, one.file_bytes) for one in found] == [
        ("W8A8", 97.0, 80, 99), ("W4A4", 95.0, 40, 99)
    ]  # fmt: skip
    assert [(one.right, one.widths, one.fp_top1) for one in found] == [(None, {}, 97.5)] * 2  # no width's own images
    assert summary(top1=90.0).by_width() == [summary(top1=90.0)]


@pytest.mark.parametrize(
    "widths", ["[1]", '{"w4": 3}', '{"w4": {"top1": 3.0}}', '{"w4": {"w_bits": 4, "a_bits": 4, "top1": "a"}}']
)
def test_widths_without_their_figures_are_damage(widths: str, tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_text(f'{{"top1": 90.0, "widths": {widths}}}')
    with pytest.raises(ValueError, match=r"summary\.json: (widths does not hold|top1 is not a number)"):
        read_summary(path)


@pytest.mark.parametrize("value", ["true", "false", "[95.0]", '"95.0"'])
def test_a_metric_that_is_no_number_is_damage(value: str, tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_text(f'{{"size_bytes": {value}}}')
    with pytest.raises(ValueError, match=r"summary\.json: size_bytes is not a number"):
        read_summary(path)


@pytest.mark.parametrize("value", ['"12"', '"8:?"', "12"])
def test_right_images_that_cannot_be_read_are_damage(value: str, tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_text(f'{{"right": {value}}}')
    with pytest.raises(ValueError, match=r"summary\.json: right does not say which images are right"):
        read_summary(path)


def test_gather_tells_finished_from_unfinished_and_damaged(tmp_path: Path) -> None:
    write_summary(tmp_path / "a" / "good", fields())
    write_summary(tmp_path / "b", fields(status="interrupted at step 40"))
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "summary.json").write_text('{"top1": 9')
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "summary.json").write_text('{"top1": "high"}')
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "summary.json").write_text("[1, 2]")
    write_summary(tmp_path / "g", fields(top1=None))
    (tmp_path / "no_run").mkdir()
    runs, problems = gather(tmp_path)
    assert [run.folder.name for run in runs] == ["good"]
    reasons = {problem.folder.name: problem.reason for problem in problems}
    assert set(reasons) == {"b", "c", "d", "e", "f", "g"}
    assert reasons["b"] == "unfinished: interrupted at step 40"
    assert "resume" in reasons["c"]
    assert "cannot be read" in reasons["d"]
    assert "top1 is not a number: 'high'" in reasons["e"]
    assert "list" in reasons["f"]
    assert "no top1" in reasons["g"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": [1]}, "seed is no whole number: [1]"),
        ({"dataset": 3}, "dataset is no text: 3"),
        ({"top1": float("nan")}, "top1 is not finite"),
        ({"layers": {"shape": 5}}, "layers is not a list"),
    ],
)
def test_a_damaged_summary_is_a_problem_beside_the_others(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_summary(tmp_path / "good", fields())
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "summary.json").write_text(json.dumps(fields(**changes)))
    runs, (problem,) = gather(tmp_path)
    assert [run.folder.name for run in runs] == ["good"] and message in problem.reason


def test_runs_behind_links_are_found_once(tmp_path: Path) -> None:
    write_summary(tmp_path / "scratch" / "run", fields())
    folder = tmp_path / "outputs"
    folder.mkdir()
    (folder / "run").symlink_to(tmp_path / "scratch" / "run", target_is_directory=True)
    (folder / "up").symlink_to(folder, target_is_directory=True)
    (folder / "same").symlink_to(tmp_path / "scratch" / "run", target_is_directory=True)
    runs, problems = gather(folder)
    assert [run.folder.name for run in runs] == ["run"] and not problems


def test_rows_go_from_full_precision_to_few_bits_and_from_calibrated_to_distilled() -> None:
    two = {"w_bits": 2, "a_bits": 2, "name": "w2a2"}
    rows = seed_groups(
        [
            summary(**two, distill="soft", top1=90.0, ptq_top1=20.0),
            summary(distill=False),
            summary(distill="soft", top1=96.0),
            summary(**two, top1=85.0, ptq_top1=20.0),
        ]
    )
    assert [(row.key.bits, row.key.way, row.top1) for row in rows] == [
        ("full precision", "full precision", 97.5),
        ("W4A4", "calibrated only", 60.0),
        ("W4A4", "trained", 95.0),
        ("W4A4", "distilled", 96.0),
        ("W2A2", "calibrated only", 20.0),
        ("W2A2", "trained", 85.0),
        ("W2A2", "distilled", 90.0),
    ]
    full, calibrated = rows[:2]
    assert (full.size_bytes, full.compression, full.effective_bits, full.bops) == (315_000, 1.0, 32.0, 716_800_000)
    assert (calibrated.size_bytes, calibrated.change.points) == (43_000, pytest.approx(-37.5))


def test_seeds_share_a_row_and_other_differences_do_not() -> None:
    rows = seed_groups([summary(seed=0, top1=95.0), summary(seed=1, top1=96.0)])
    trained = rows[-1]
    assert (trained.seeds, trained.top1) == (2, 95.5)
    assert trained.std == pytest.approx(0.5**0.5)  # of 95 and 96, with n - 1
    assert table_rows(rows)[-1][3] == "95.50 ± 0.71, 2 seeds"
    rows = seed_groups([summary(name="lr_small", top1=95.0), summary(name="lr_large", top1=96.0)])
    assert [(row.key.name, row.top1) for row in rows[-2:]] == [("lr_large", 96.0), ("lr_small", 95.0)]
    rows = seed_groups([summary(quantizer="lsq"), summary(quantizer="affine", top1=93.0)])
    assert [row[1] for row in table_rows(rows)] == ["32", "W4A4 affine", "W4A4 affine", "W4A4 lsq", "W4A4 lsq"]


def test_students_that_were_only_calibrated_are_told_apart_by_name() -> None:
    ways = [
        summary(name=name, epochs=0, top1=top1, ptq_top1=None) for name, top1 in (("nearest", 89.0), ("brecq", 91.0))
    ]
    rows = seed_groups([*ways, summary(top1=95.0, ptq_top1=70.0)])
    assert [(row.key.way, row.key.name, row.top1) for row in rows[1:]] == [
        ("calibrated only", "", 70.0),
        ("calibrated only", "brecq", 91.0),
        ("calibrated only", "nearest", 89.0),
        ("trained", "", 95.0),
    ]


def test_a_full_precision_run_is_the_reference_row_of_its_model() -> None:
    rows = seed_groups([summary(model="teacher", w_bits=32, a_bits=32, top1=98.0, fp_top1=None, ptq_top1=None)])
    assert [(row.key.way, row.top1) for row in rows] == [("full precision", 98.0)]


def test_metrics_that_no_run_knows_are_left_blank() -> None:
    rows = table_rows(seed_groups([RunSummary(model="m", w_bits="mixed", a_bits=None, top1=50.0)]))
    assert rows == [("m", "WmixedA?", "trained", "50.00", "", "", "", "", "", "", "")]


@pytest.mark.parametrize(("size", "text"), [(12, "12 B"), (68_512, "68.5 kB"), (1_084_000, "1.08 MB")])
def test_sizes_are_in_a_fitting_unit(size: int, text: str) -> None:
    assert size_text(size) == text


def test_the_plain_table_is_aligned() -> None:
    lines = plain_table(COLUMNS, table_rows(seed_groups([summary()]))).splitlines()
    assert lines[0].split() == "Model Bits Training Top-1 % Images Change Size File Smaller Bits/weight GBOPs".split()
    ends = {line.rindex(word) + len(word) for line, word in zip(lines, ["GBOPs", "0.717", "0.0112"], strict=False)}
    assert len(ends) == 1


def test_the_files_length_stands_beside_the_counted_size_where_it_is_known() -> None:
    columns, rows = closing_table(seed_groups([summary(file_bytes=45_678), summary(model="other")]))
    at = columns.index("File")
    assert columns[at - 1] == "Size"
    assert {row[at] for row in rows} == {"45.7 kB", ""}
    assert "File" not in closing_table(seed_groups([summary()]))[0]


def test_the_closing_table_goes_to_a_pipe_and_to_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")  # too narrow: no metric may be left out for that
    write_summary(tmp_path / "a", fields())
    write_summary(tmp_path / "b", fields(status="interrupted"))

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    pipe, terminal = io.StringIO(), Terminal()
    print_summary(tmp_path, file=pipe)
    print_summary(tmp_path, file=terminal)
    assert "─" not in pipe.getvalue() and "─" in terminal.getvalue()
    for text in (pipe.getvalue(), terminal.getvalue()):
        assert "95.00" in text and "43.0 kB" in text and "0.0112" in text and "interrupted" in text


def test_typical_bits_are_those_of_layers_and_not_of_operands() -> None:
    """A student for a target has more operands, of 8 bits, than layers of few bits."""
    operands = {f"add_{i}.{side}": LayerBits(32, 8) for i in range(3) for side in ("left", "right")}
    layers = {"stem": LayerBits(8, 8), "conv1": LayerBits(2, 4), "conv2": LayerBits(2, 4)}
    assert typical_bits({**operands, **layers}) == (2, 4)
    assert typical_bits(operands) == (32, 8)
    ends = LayerBits(8, 8)
    assert typical_bits({"first": ends, "middle": LayerBits(4, 4), "last": ends}) == (4, 4), "of three, two are ends"
    assert typical_bits({"first": ends, "last": ends}) == (8, 8)
    assert typical_bits({}) == (32, 32)
