"""The forms of one student beside each other: a row of accuracies and of images on which two disagree."""

from pathlib import Path
from types import ModuleType

import pytest
import torch

from qtrain.pipeline.results import read_results
from tests.helpers.script import load_script

FORMS = ("fp", "student", "reference", "onnxruntime", "openvino")


@pytest.fixture(scope="module")
def agreement() -> ModuleType:
    return load_script("agreement")


def test_two_forms_disagree_on_the_images_to_which_they_give_other_classes(agreement: ModuleType) -> None:
    row = agreement.columns(
        {"a": torch.tensor([1, 2, 3, 4]), "b": torch.tensor([1, 2, 4, 3])}, torch.tensor([1, 2, 3, 0])
    )
    assert row == {"a_top1": 75.0, "b_top1": 50.0, "a_b": 2}


def test_a_run_gets_a_row_with_every_form_and_pair(agreement: ModuleType, run_folder: Path, tmp_path: Path) -> None:
    table = tmp_path / "agreement.csv"
    assert agreement.main([str(run_folder), "--results", str(table), "--causes"]) == 0
    (row,) = read_results(table)
    assert (row["task"], row["w_bits"], row["a_bits"], row["test_images"]) == ("agreement", "4", "4", "50")
    assert row["top1"] == row["student_top1"]
    assert all(0 <= float(row[f"{form}_top1"]) <= 100 and float(row[f"{form}_cpu_s"]) > 0 for form in FORMS)
    pairs = [f"{one}_{other}" for place, one in enumerate(FORMS) for other in FORMS[place + 1 :]]
    assert all(0 <= int(row[pair]) <= 50 for pair in pairs) and len(pairs) == 10
    assert int(row["student_reference"]) <= 2  # ties alone


def test_a_folder_without_a_student_ends_in_one_line(
    agreement: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert agreement.main([str(tmp_path), "--results", str(tmp_path / "agreement.csv")]) == 2
    assert capsys.readouterr().err.startswith("agreement: error: ")
