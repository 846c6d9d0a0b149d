"""A finished run is not repeated, and yet a results file that lacks its rows gets them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qtrain.config.compose import compose
from qtrain.pipeline.former_run import set_aside
from qtrain.pipeline.results import read_results
from qtrain.pipeline.run_folder import Metrics, append_results, claim_folder, finish, run_in_folder
from qtrain.pipeline.summary import FINISHED
from qtrain.settings.run_files import EXAMPLES, FORMER, LATENT, STUDENT
from qtrain.settings.run_files import SUMMARY as SUMMARY_FILE
from qtrain.settings.run_settings import RunSettings
from qtrain.utils.errors import ConfigError

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


def overwritten(tmp_path: Path, work: Callable[[Path], Any]) -> tuple[Path, dict[str, bytes]]:
    """The folder of a finished run that ``work`` is to replace, and what it held before."""
    settings = ended(tmp_path)
    folder = Path(settings.run_dir)
    for name in (STUDENT, LATENT, EXAMPLES, "checkpoints/last.ckpt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("of the former run")
    before = files_of(folder)
    again = compose([f"output={tmp_path}", "name=run", "overwrite=true", "quantize.bits.weight=2"])
    run_in_folder(again, work, names=["top1"])
    return folder, before


def files_of(folder: Path) -> dict[str, bytes]:
    kept = [path for path in folder.rglob("*") if path.is_file() and path.name not in (".lock", ".holder")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept}


def test_a_run_that_is_overwritten_leaves_nothing_of_the_former(tmp_path: Path) -> None:
    def work(folder: Path) -> dict[str, float | None]:
        assert not any((folder / name).exists() for name in (STUDENT, LATENT, EXAMPLES, SUMMARY_FILE, "checkpoints"))
        (folder / SUMMARY_FILE).write_text("{}")
        return {}

    folder, before = overwritten(tmp_path, work)
    assert "of the former run" not in {text.decode() for text in files_of(folder).values()}
    assert (folder / SUMMARY_FILE).read_bytes() != before[SUMMARY_FILE]


@pytest.mark.parametrize("error", [ConfigError, KeyboardInterrupt, ZeroDivisionError])
def test_a_run_that_fails_before_it_begins_costs_nothing_of_the_former(
    error: type[BaseException], tmp_path: Path
) -> None:
    def work(folder: Path) -> None:
        (folder / "metrics.jsonl").write_text("of the new run")
        raise error("wrong")

    with pytest.raises(error):
        overwritten(tmp_path, work)
    folder = Path(compose([f"output={tmp_path}", "name=run"]).run_dir)
    found = files_of(folder)
    assert {name for name, text in found.items() if text == b"of the former run"} == {
        STUDENT, LATENT, EXAMPLES, "checkpoints/last.ckpt"
    }  # fmt: skip
    assert SUMMARY_FILE in found and "metrics.jsonl" not in found and not any(FORMER in name for name in found)
    settings = compose([f"output={tmp_path}", "name=run"])
    assert run_in_folder(settings, lambda _: pytest.fail("it is finished"), names=["top1"]) is not None


def test_a_run_that_was_killed_before_it_began_costs_nothing_either(tmp_path: Path) -> None:
    settings = ended(tmp_path)
    folder = Path(settings.run_dir)
    before = files_of(folder)
    set_aside(folder)
    (folder / "config.yaml").write_text("{}")
    assert run_in_folder(settings, lambda _: pytest.fail("it is finished"), names=["top1"]) is not None
    assert files_of(folder) == before


def test_a_run_that_has_begun_goes_on_and_the_former_waits_until_its_end(tmp_path: Path) -> None:
    def work(folder: Path) -> None:
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints" / "last.ckpt").write_text("of the new run")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        overwritten(tmp_path, work)
    again = compose([f"output={tmp_path}", "name=run", "quantize.bits.weight=2"])
    folder = Path(again.run_dir)
    assert (folder / "checkpoints" / "last.ckpt").read_text() == "of the new run"
    assert (folder / FORMER / STUDENT).is_file()

    def finish(place: Path) -> dict[str, float | None]:
        (place / SUMMARY_FILE).write_text("{}")
        return {}

    run_in_folder(again, finish, names=["top1"])
    assert not (folder / FORMER).exists()


@pytest.mark.parametrize("key", ["data.workers=1", "data.check=true"])
def test_what_no_result_depends_on_makes_no_other_run(key: str, tmp_path: Path) -> None:
    data = ["data=imagefolder", f"data.root={tmp_path}"]
    assert compose([*data, key]).identity == compose(data).identity != compose([*data, "data.batch_size=3"]).identity
