"""`task=export` leaves a folder that runs elsewhere and says whether it computes what was trained."""

import csv
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import yaml
from onnx import numpy_helper
from PIL import Image

from qtrain.config.compose import compose, read_run
from qtrain.deployment.onnx.write import LOGITS
from qtrain.deployment.parity.runtimes import RUNTIMES, Runtime
from qtrain.packed.header import Images
from qtrain.pipeline.export_run import check_export, shipped
from qtrain.run_task import run_task
from qtrain.settings.run_files import CONFIG
from qtrain.tasks.evaluate import of_its_run
from qtrain.utils.errors import ConfigError, IncompleteError
from tests.helpers.calibrated_run import QUICK
from tests.packed.students import saved, student_of, timm_network


def export(run_folder: Path, *more: str) -> dict[str, float]:
    return run_task(compose([f"checkpoint={run_folder}", "export.images=20", f"output={run_folder.parent}", *more]))


@pytest.fixture(scope="module")
def folder(run_folder: Path) -> Path:
    export(run_folder, "task=export")
    return run_folder / "export"


def test_the_folder_holds_what_the_page_says(folder: Path, run_folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "images", "labels.json", "model.onnx", "run.py", "student.safetensors", "verify.json",
    }  # fmt: skip
    assert len(list((folder / "images").glob("*-label-*.png"))) == 3
    verdict = json.loads((folder / "verify.json").read_text())
    assert verdict["passed"] is True
    assert (verdict["images"], verdict["test_images"], verdict["compared_on"]) == (20, 50, "test images")
    assert verdict["top1"]["student"] == pytest.approx(verdict["top1"]["onnxruntime"], abs=4.1)
    assert (folder / "student.safetensors").read_bytes() == (run_folder / "student.safetensors").read_bytes()
    page = (folder / "README.md").read_text()
    assert f"{verdict['top1']['student']:.2f} % of the student" in page
    assert f"`model.onnx`: {(folder / 'model.onnx').stat().st_size} bytes" in page


def test_the_program_names_the_students_class_for_an_image_of_another_size(folder: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (19, 14), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "digit.png")
    program = [sys.executable, str(folder / "run.py"), str(tmp_path / "digit.png")]
    said = subprocess.run(program, capture_output=True, text=True, check=True, cwd=tmp_path).stdout.split("\t")
    csv = tmp_path / "classes.csv"
    run_task(compose(["task=predict", f"checkpoint={folder / 'student.safetensors'}", f"images=[{tmp_path}/digit.png]",
                      f"predict.output={csv}", "predict.workers=0", f"output={tmp_path}"]))  # fmt: skip
    best = csv.read_text().splitlines()[1].split(",")
    assert said[1].split()[0] == best[1]
    assert float(said[1].split()[1]) == pytest.approx(float(best[2]), abs=0.05)


def test_accuracy_of_the_integers_is_given_where_all_images_are_compared(run_folder: Path, tmp_path: Path) -> None:
    folder, table = tmp_path / "export", tmp_path / "export.csv"
    export(run_folder, "task=export", "export.images=50", f"export.output={folder}", f"results={table}")
    verdict = json.loads((folder / "verify.json").read_text())
    assert verdict["images"] == verdict["test_images"] == 50
    differ = len(next(tier for tier in verdict["tiers"] if tier["name"] == "reference")["disagreeing"])
    assert verdict["top1"]["reference"] == pytest.approx(verdict["top1"]["student"], abs=2 * differ)
    assert f"{verdict['top1']['reference']:.2f} % computed with integers only" in (folder / "README.md").read_text()
    with table.open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["reference_top1"]) == verdict["top1"]["reference"]
    assert float(row["reference_cpu_s"]) > 0


def test_a_results_file_gets_a_row(folder: Path, run_folder: Path, tmp_path: Path) -> None:
    export(run_folder, "task=verify", f"results={tmp_path / 'export.csv'}")
    with (tmp_path / "export.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["task"], row["dataset"], row["w_bits"], row["a_bits"]) == ("verify", "digits", "4", "4")
    assert int(row["onnx_bytes"]) == (folder / "model.onnx").stat().st_size
    assert (row["compared_images"], row["test_images"], row["passed"]) == ("20", "50", "true")
    tiers = {tier["name"]: tier for tier in json.loads((folder / "verify.json").read_text())["tiers"]}
    for name in ("reference", "onnxruntime"):
        assert int(row[f"{name}_codes"]) == sum(layer["differing"] for layer in tiers[name]["layers"])
        assert int(row[f"{name}_predictions"]) == len(tiers[name]["disagreeing"])


def test_openvino_is_compared_beside_it_and_a_file_may_take_batches_of_one_length(
    run_folder: Path, tmp_path: Path
) -> None:
    table, folder = tmp_path / "export.csv", tmp_path / "fixed"
    more = ["export.batch=16", "export.runtimes=null", f"results={table}", f"export.output={folder}"]
    export(run_folder, "task=export", *more)
    verdict = json.loads((folder / "verify.json").read_text())
    assert [tier["name"] for tier in verdict["tiers"]][-2:] == ["onnxruntime", "openvino"]
    assert (verdict["passed"], verdict["images"], verdict["test_images"]) == (True, 16, 50)
    top1 = verdict["top1"]
    assert set(top1) == {"student", "onnxruntime", "openvino"}
    assert top1["openvino"] == pytest.approx(top1["student"], abs=4.1)
    assert f"{top1['openvino']:.2f} % of `model.onnx` in OpenVINO" in (folder / "README.md").read_text()
    with table.open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["openvino_top1"]) == pytest.approx(top1["openvino"])
    assert int(row["openvino_predictions"]) == len(verdict["tiers"][-1]["disagreeing"])
    (first, *_) = onnx.load(folder / "model.onnx").graph.input[0].type.tensor_type.shape.dim
    assert first.dim_value == 16


@pytest.mark.parametrize("course", ["stages=progressive", "+callback@callbacks.bits=bits"])
def test_a_student_for_a_target_whose_bits_fall_while_it_trains_is_exported(
    run_folder: Path, tmp_path: Path, course: str
) -> None:
    weights = f"model.weights={run_folder.parents[2] / 'small.safetensors'}"
    model = ["model=cifar_resnet8", "model.width=0.25", weights, "target=onnxruntime"]
    bits = ["quantize.bits.weight=2", "quantize.bits.input=2", "fit.epochs=2", "fit.health_every_steps=0"]
    run_task(compose(["task=train", "name=made", f"output={tmp_path}", *model, *bits, *QUICK, course]))
    export(tmp_path / "adhoc" / "made", "task=export")
    verdict = json.loads((tmp_path / "adhoc" / "made" / "export" / "verify.json").read_text())
    assert verdict["passed"] and verdict["top1"]["student"] == verdict["top1"]["onnxruntime"]
    tiers = {tier["name"]: tier["layers"] for tier in verdict["tiers"]}
    assert any(".add." in layer["layer"] for layer in tiers["onnxruntime"])


def test_a_run_whose_config_knows_neither_target_nor_search_yet_is_read(run_folder: Path, tmp_path: Path) -> None:
    """Runs of earlier versions lack the keys that came since."""
    older = tmp_path / "made"
    shutil.copytree(run_folder, older, ignore=shutil.ignore_patterns("export"))
    config = yaml.safe_load((older / CONFIG).read_text())
    del config["target"], config["allocate"]
    config["quantize"]["operations"] = {"add": None, "matmul": None, "softmax": None}
    (older / CONFIG).write_text(yaml.safe_dump(config))
    settings = read_run(older, compose(["task=export"]))
    assert settings.target is None and settings.quantize.operations.activation is None


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("export.runtimes=[tensorrt]", r"^export: runtimes: must be among onnxruntime, openvino, got tensorrt"),
        ("export.batch=0", r"^export: batch: must be at least 1, or null for any number of images, got 0"),
    ],
)
def test_a_wrong_option_ends_in_one_line_before_anything_is_written(
    run_folder: Path, tmp_path: Path, option: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        export(run_folder, "task=export", f"export.output={tmp_path / 'new'}", option)
    assert not (tmp_path / "new").exists()


def test_a_changed_file_ends_in_exit_code_1_and_names_the_constant(folder: Path, run_folder: Path) -> None:
    file = folder / "model.onnx"
    good = file.read_bytes()
    model = onnx.load_from_string(good)
    tensor = next(t for t in model.graph.initializer if t.name == "layer2.0.conv1.weight.codes")
    codes = numpy_helper.to_array(tensor).copy()
    codes.reshape(-1)[3] += 1
    tensor.CopyFrom(numpy_helper.from_array(codes, tensor.name))
    try:
        file.write_bytes(model.SerializeToString())
        with pytest.raises(IncompleteError, match="does not compute what was trained") as caught:
            export(run_folder, "task=verify")
        assert caught.value.exit_code == 1
        verdict = json.loads((folder / "verify.json").read_text())
        assert verdict["tiers"][0]["faults"] == ["layer2.0.conv1.weight.codes: 1 of its bytes are not the student's"]
    finally:
        file.write_bytes(good)
    export(run_folder, "task=verify")
    assert json.loads((folder / "verify.json").read_text())["passed"] is True


def test_a_lone_file_whose_images_are_not_at_hand_is_compared_on_noise(tmp_path: Path) -> None:
    network = timm_network("cifar_resnet8", size=12, classes=4, width=0.25)
    student, _ = student_of(network, [], size=12)
    lone = tmp_path / "student.safetensors"
    saved(student, lone, network, Images((3, 12, 12)))
    run_task(compose(["task=export", f"checkpoint={lone}", "export.images=4", f"output={tmp_path}"]))
    verdict = json.loads((tmp_path / "export" / "verify.json").read_text())
    assert (verdict["compared_on"], verdict["images"], verdict["passed"]) == ("noise", 4, True)


def test_export_without_a_student_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^checkpoint: task=export needs a student; give checkpoint=RUN_FOLDER"):
        run_task(compose(["task=export", f"output={tmp_path}"]))


def test_verify_without_an_export_says_which_task_writes_it(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no file .*model.onnx; task=export writes it"):
        export(run_folder, "task=verify", f"export.output={tmp_path / 'nothing'}")


def test_images_with_another_class_are_listed_with_their_cause(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = RUNTIMES["onnxruntime"]

    def wrong(data: bytes) -> Runtime:
        run = right(data)
        return lambda inputs: {name: -found if name == LOGITS else found for name, found in run(inputs).items()}

    monkeypatch.setitem(RUNTIMES, "onnxruntime", wrong)
    folder = tmp_path / "wrong"
    with pytest.raises(IncompleteError, match="does not compute what was trained"):
        export(run_folder, "task=export", f"export.output={folder}")
    tier = json.loads((folder / "verify.json").read_text())["tiers"][-1]
    assert [one["image"] for one in tier["disagreeing"]] == list(range(20))
    assert {type(one["cause"]) for one in tier["disagreeing"]} == {str}
    assert tier["faults"][-1].startswith("images ")


@pytest.mark.parametrize(
    ("target", "runtimes", "said"),
    [
        ("openvino", ["onnxruntime"], ["the student is for OpenVINO, which is not compared; "
                                       "export.runtimes=[onnxruntime,openvino] compares it too"]),
        ("openvino", ["onnxruntime", "openvino"], []),
        ("tensorrt", ["onnxruntime"], []),  # which is not among the runtimes
    ],
)  # fmt: skip
def test_a_student_that_is_not_compared_in_its_own_runtime_is_named(
    folder: Path, run_folder: Path, caplog: pytest.LogCaptureFixture, target: str, runtimes: list[str], said: list[str]
) -> None:
    typed = [f"checkpoint={run_folder}", "task=verify", f"export.runtimes=[{','.join(runtimes)}]"]
    settings = of_its_run(compose(typed), run_folder / "student.safetensors")
    what = shipped(settings)
    origin = what.header.origin | {"target": target}
    (folder / "model.onnx").rename(folder / "kept.onnx")  # what follows is not looked at
    (folder / "model.onnx").touch()
    try:
        with pytest.raises(ConfigError):
            check_export(settings, replace(what, header=replace(what.header, origin=origin)))
    finally:
        (folder / "kept.onnx").replace(folder / "model.onnx")
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == said
