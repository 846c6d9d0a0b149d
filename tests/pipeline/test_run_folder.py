"""A finished run is not repeated, and yet a results file that lacks its rows gets them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qtrain.config.compose import compose
from qtrain.pipeline.results import read_results
from qtrain.pipeline.run_folder import Metrics, append_results, claim_folder, finish, run_in_folder
from qtrain.pipeline.summary import FINISHED
from qtrain.settings.run_files import EXAMPLES, LATENT, STUDENT
from qtrain.settings.run_files import SUMMARY as SUMMARY_FILE
from qtrain.settings.run_settings import RunSettings

SUMMARY = {"name": "run", "top1": 90.0, "fp_top1": 95.0, "status": FINISHED}


def ended(tmp_path: Path, summary: dict[str, object] | None = None) -> RunSettings:
    """The settings of a run that has ended in ``tmp_path``, without a results file of the user's."""
    settings = compose([f"output={tmp_path}", "name=run"])
    folder = Path(settings.run_dir)
    claim_folder(settings, folder)
    append_results(settings, folder, summary or SUMMARY, device=torch.device("cpu"), notes="budget=cpu")
    finish(folder, SUMMARY)
    return settings


def again(tmp_path: Path, results: Path) -> Metrics:
    settings = compose([f"output={tmp_path}", "name=run", f"results={results}"])
    return run_in_folder(settings, lambda _: pytest.fail("the run is finished"), names=["top1"])


def test_a_results_file_gets_the_row_of_a_finished_run_once(tmp_path: Path) -> None:
    settings, mine = ended(tmp_path), tmp_path / "mine.csv"
    for _ in range(2):
        assert again(tmp_path, mine) == {"top1": 90.0}
        assert read_results(mine) == read_results(Path(settings.run_dir) / "results.csv")
    (row,) = read_results(mine)
    assert (row["top1"], row["notes"], row["config_hash"]) == ("90", "budget=cpu", settings.identity)


def test_all_widths_of_a_student_of_many_bits_are_copied(tmp_path: Path) -> None:
    figures = {"w4": {"w_bits": 4, "a_bits": 4, "top1": 90.0}, "w2": {"w_bits": 2, "a_bits": 2, "top1": 80.0}}
    ended(tmp_path, SUMMARY | {"widths": figures})
    again(tmp_path, tmp_path / "mine.csv")
    assert [row["w_bits"] for row in read_results(tmp_path / "mine.csv")] == ["4", "2"]


def test_of_a_run_that_was_overwritten_the_last_row_is_copied(tmp_path: Path) -> None:
    settings = ended(tmp_path)
    own = Path(settings.run_dir) / "results.csv"
    text = own.read_text()
    own.write_text(text + text.splitlines()[1].replace("90,95", "91,95").replace("20", "21", 1) + "\n")
    again(tmp_path, tmp_path / "mine.csv")
    assert [row["top1"] for row in read_results(tmp_path / "mine.csv")] == ["91"]


def test_a_foreign_file_is_refused_before_anything_else(tmp_path: Path) -> None:
    ended(tmp_path)
    (tmp_path / "mine.csv").write_text("name,age\nAda,36\n")
    with pytest.raises(ValueError, match="does not start with the columns"):
        again(tmp_path, tmp_path / "mine.csv")


def test_a_run_that_is_overwritten_leaves_nothing_of_the_former(tmp_path: Path) -> None:
    settings = ended(tmp_path)
    folder = Path(settings.run_dir)
    for name in (STUDENT, LATENT, EXAMPLES):
        (folder / name).write_text("of the former run")
    with pytest.raises(ZeroDivisionError):
        again = compose([f"output={tmp_path}", "name=run", "overwrite=true", "quantize.bits.weight=2"])
        run_in_folder(again, lambda _: 1 // 0, names=["top1"])  # type: ignore[arg-type, return-value]
    assert not any((folder / name).exists() for name in (STUDENT, LATENT, EXAMPLES, SUMMARY_FILE))


@pytest.mark.parametrize("key", ["data.workers=1", "data.check=true"])
def test_what_no_result_depends_on_makes_no_other_run(key: str, tmp_path: Path) -> None:
    data = ["data=imagefolder", f"data.root={tmp_path}"]
    assert compose([*data, key]).identity == compose(data).identity != compose([*data, "data.batch_size=3"]).identity
