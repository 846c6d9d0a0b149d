"""`task=benchmark` measures an export beside its rivals and writes a row for each number of images at a time."""

import csv
import json
import shutil
from pathlib import Path

import pytest

from qtrain.config.compose import compose
from qtrain.run_task import run_task
from qtrain.utils.errors import ConfigError
from tests.helpers.calibrated_run import QUICK


@pytest.fixture(scope="module", autouse=True)
def exported(run_folder: Path) -> Path:
    """The export of the student."""
    run_task(compose(["task=export", f"checkpoint={run_folder}", "export.images=5", f"output={run_folder.parent}"]))
    return run_folder / "export"


def measure(run_folder: Path, *more: str) -> dict[str, float]:
    quick = ["benchmark.rounds=3", "benchmark.batch=4", "benchmark.images=30"]
    return run_task(compose(["task=benchmark", f"checkpoint={run_folder}", f"output={run_folder}", *quick, *more]))


def test_times_sizes_and_what_runs_in_integers_are_printed_and_written(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = measure(run_folder, f"results={tmp_path / 'speed.csv'}")
    assert set(found) == {"of_full_precision", "of_int8"} and min(found.values()) > 0
    said = capsys.readouterr().out
    assert "1 thread, 3 rounds" in said and "runtime's INT8: 12 of 12 layers in integers" in said
    assert "batch of 4, export:" in said and "of 30 predictions are those of full precision" in said
    with (tmp_path / "speed.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["batch"] for row in rows] == ["1", "4"]
    for row in rows:
        assert (row["task"], row["threads"], row["rounds"], row["test_images"]) == ("benchmark", "1", "3", "30")
        assert int(row["onnx_bytes"]) == (run_folder / "export" / "model.onnx").stat().st_size
        for name in ("ms", "fp_ms", "int8_ms", "of_fp", "of_int8"):
            assert 0 < float(row[f"{name}_low"]) <= float(row[name]) <= float(row[f"{name}_high"])
        assert int(row["integer_layers"]) <= int(row["layers"]) and float(row["int8_integer_macs"]) == 1
        assert 0 <= float(row["agreement"]) <= 100 and 0 <= float(row["int8_top1"]) <= 100


def test_the_folder_names_the_time_until_its_file_becomes_another_one(
    run_folder: Path, exported: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "export"
    shutil.copytree(exported, folder)
    there = f"export.output={folder}"
    measure(run_folder, there)
    speed = json.loads((folder / "benchmark.json").read_text())
    assert [row["batch"] for row in speed["rows"]] == [1, 4]
    said = f"Time of one image in ONNX Runtime: {speed['rows'][0]['ms']:.2f} ms"
    accuracy, compared = "- Accuracy on 50 test images: ", "layer by layer on 5 images (test images), passed"
    for more in ([], ["task=verify"], ["task=export"], ["task=export", "export.batch=5"]):
        if more:
            run_task(compose([f"checkpoint={run_folder}", "export.images=5", f"output={tmp_path}", there, *more]))
        page = (folder / "README.md").read_text()
        assert accuracy in page and compared in page
        assert (said in page) == (folder / "benchmark.json").exists() == ("export.batch=5" not in more)
    assert (folder / "model.onnx").read_bytes() != (exported / "model.onnx").read_bytes()


def test_without_an_export_the_task_that_writes_it_is_named(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no file .*model.onnx; task=export writes it"):
        measure(run_folder, f"export.output={tmp_path / 'nothing'}")


@pytest.mark.parametrize(("key", "least"), [("batch", 1), ("rounds", 2), ("threads", 1), ("images", 1)])
def test_a_number_that_is_too_small_is_refused(run_folder: Path, key: str, least: int) -> None:
    with pytest.raises(ConfigError, match=rf"benchmark.{key}: must be at least {least}, got {least - 1}"):
        measure(run_folder, f"benchmark.{key}={least - 1}")


def test_weights_that_are_not_at_hand_are_said_and_give_no_accuracy(
    run_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lone = tmp_path / "student.safetensors"
    lone.write_bytes((run_folder / "student.safetensors").read_bytes())
    folder = f"export.output={run_folder / 'export'}"
    found = measure(lone, folder, "data=digits", *QUICK[:4], f"results={tmp_path / 'speed.csv'}", f"output={tmp_path}")
    assert found["of_int8"] > 0
    assert "full precision has random weights, which take as long" in caplog.text
    with (tmp_path / "speed.csv").open() as file:
        assert all("agreement" not in row for row in csv.DictReader(file))


def test_a_file_for_a_fixed_number_of_images_is_refused(run_folder: Path, tmp_path: Path) -> None:
    there = [f"checkpoint={run_folder}", f"export.output={tmp_path}", f"output={tmp_path}"]
    run_task(compose(["task=export", "export.batch=5", "export.images=5", *there]))
    with pytest.raises(ConfigError, match=r"is for 5 images at a time; export anew with export.batch=null"):
        measure(run_folder, f"export.output={tmp_path}")
