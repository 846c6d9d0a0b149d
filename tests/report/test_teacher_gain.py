"""What a teacher adds, in sentences and as a file that the package shows."""

from pathlib import Path
from typing import Any

import pytest

from qtrain.pipeline.summary import RunSummary
from qtrain.report import teacher_gain
from qtrain.report.seed_groups import seed_groups
from qtrain.report.teacher_gain import gain_lines, read_recorded, recorded_of, recorded_text, teacher_gains


def run(distill: str, **changes: Any) -> RunSummary:
    fields: dict[str, Any] = dict(
        experiment="quickstart", name="w2a2", dataset="digits", model="resnet8", quantizer="lsq", w_bits=2, a_bits=2,
        distill=distill, seed=0, epochs=3, top1=90.0, fp_top1=98.0, test_images=900, data_hash="d", recipe_hash=distill,
    )  # fmt: skip
    return RunSummary(**(fields | changes))


SEEDS = [
    run(way, seed=seed, top1=float(top1))
    for way, tops in (("none", (80, 82, 84)), ("soft", (91, 91, 94)))
    for seed, top1 in enumerate(tops)
]
"""Gains of 11, 9 and 10 points: deviation 1 over the root of 3. Images: 82 x 18 + 92 x 8 = 2212 over 900."""


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "recorded.csv"
    file.write_text(recorded_text(recorded_of("quickstart", SEEDS, ["abc", "abc"])))
    monkeypatch.setattr(teacher_gain, "RECORDED", file)
    return file


def test_gain_is_paired_by_seed() -> None:
    (gain,) = teacher_gains(seed_groups(SEEDS))
    found = gain.difference
    assert (found.points, found.paired) == (pytest.approx(10.0), 3)
    assert found.seed_error == pytest.approx(0.577350, abs=1e-6)
    assert found.error == pytest.approx(1.670662, abs=1e-6)


def test_recorded_gain_comes_back_from_its_file(recorded: Path) -> None:
    (row,) = read_recorded()
    assert (row.bits, row.seeds, row.test_images, row.commit) == ("W2A2", "3", "900", "abc")
    assert (row.trained, row.trained_std, row.distilled, row.distilled_std) == ("82.00", "2.00", "92.00", "1.73")
    assert (row.gain, row.error, row.seed_error) == ("+10.00", "1.67", "0.58")


def test_one_seed_is_shown_beside_the_recorded_ones(recorded: Path) -> None:
    """86 and 90 % of 900 images: sqrt((86 x 14 + 90 x 10) / 900) = 1.53 points."""
    (line,) = gain_lines([run("none", top1=86.0), run("soft", top1=90.0)])
    assert line == (
        "W2A2, distilled against trained: +4.00 (1.53) points, one seed, 900 test images; "
        "recorded over 3 seeds: +10.00 (1.67; by seeds alone 0.58)."
    )


def test_gain_says_the_seeds_of_both_sides_and_whether_they_are_paired() -> None:
    def said(distilled: list[int], trained: list[int]) -> str:
        runs = [run("none", seed=seed, top1=86.0) for seed in trained]
        (line,) = gain_lines([*runs, *(run("soft", seed=seed) for seed in distilled)])
        return line.partition("points, ")[2].partition(", 900")[0]

    assert said([0, 1, 2], [0, 1]) == "3 and 2 seeds, not paired"
    assert said([0], [1]) == "1 and 1 seeds, not paired"
    assert (said([0, 1], [1, 0]), said([4], [4])) == ("2 seeds", "one seed")


@pytest.mark.parametrize("changes", [{"experiment": "other"}, {"test_images": 360}, {"w_bits": 4}, {"dataset": "mine"}])
def test_recorded_gain_of_something_else_is_not_shown(recorded: Path, changes: dict[str, Any]) -> None:
    (line,) = gain_lines([run("none", **changes), run("soft", **changes)])
    assert "recorded" not in line


def test_runs_that_differ_in_more_than_the_teacher_have_no_gain() -> None:
    assert gain_lines([run("soft"), run("none", w_bits=4)]) == []
    assert gain_lines([run("soft"), run("none"), run("none", recipe_hash="b", name="longer")]) == []


def test_the_file_of_the_package_can_be_read_and_is_of_many_seeds() -> None:
    assert all(row.experiment == "quickstart" and int(row.seeds) > 1 for row in read_recorded())
