"""Test images on the page, from what runs have kept."""

import json
from pathlib import Path
from typing import Any

from qtrain.pipeline.summary import CALIBRATED, FLOAT, TRAINED, Run, RunSummary
from qtrain.report.examples import SHOWN, read_examples
from qtrain.settings.run_files import EXAMPLES

LABELS = [str(number % 10) for number in range(20)]


def kept(folder: Path, bits: int, **content: Any) -> Run:
    folder.mkdir(parents=True)
    images = [f"image{number}" for number in range(20)]
    (folder / EXAMPLES).write_text(json.dumps({"images": images, "labels": LABELS, "answers": {}} | content))
    return Run(folder, RunSummary(w_bits=bits, a_bits=bits, epochs=1, distill="none"))


def wrong_at(*places: int) -> list[str]:
    return ["x" if number in places else label for number, label in enumerate(LABELS)]


def test_images_that_most_models_get_wrong_are_shown(tmp_path: Path) -> None:
    runs = [
        kept(tmp_path / "a", 4, answers={FLOAT: LABELS, TRAINED: wrong_at(19)}),
        kept(tmp_path / "b", 2, answers={FLOAT: LABELS, CALIBRATED: wrong_at(5, 18, 19), TRAINED: wrong_at(18, 19)}),
    ]
    found = read_examples(runs)
    assert found is not None and found.kept == 20 and len(found.images) == SHOWN
    assert found.images == tuple(f"image{number}" for number in [*range(10), 18, 19])
    assert found.labels[-2:] == ("8", "9")
    assert [(row.model, row.right) for row in found.rows] == [
        (FLOAT, 20), (f"W4A4 {TRAINED}", 19), (f"W2A2 {CALIBRATED}", 17), (f"W2A2 {TRAINED}", 18),
    ]  # fmt: skip
    assert found.rows[1].said[-2:] == (("8", True), ("x", False))


def test_two_models_of_one_name_are_told_apart_by_their_runs(tmp_path: Path) -> None:
    found = read_examples([kept(tmp_path / name, 2, answers={TRAINED: LABELS}) for name in ("seed0", "seed1")])
    assert found is not None
    assert [row.model for row in found.rows] == [f"W2A2 {TRAINED}", f"W2A2 {TRAINED}, seed1"]


def test_runs_with_other_images_and_damaged_files_are_left_out(tmp_path: Path) -> None:
    good = kept(tmp_path / "good", 2, answers={TRAINED: LABELS})
    other = kept(tmp_path / "other", 4, answers={TRAINED: LABELS}, images=["another"] * 20)
    short = kept(tmp_path / "short", 3, answers={TRAINED: LABELS[:3]})
    damaged = kept(tmp_path / "damaged", 3)
    (damaged.folder / EXAMPLES).write_text("{")
    found = read_examples([short, damaged, good, other])
    assert found is not None and [row.model for row in found.rows] == [f"W2A2 {TRAINED}"]
    assert read_examples([short, damaged]) is None
