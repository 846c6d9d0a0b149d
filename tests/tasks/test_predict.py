"""`task=predict`: what it writes, and what it says of bad images and bad input."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from qtrain import cli
from qtrain.config.compose import compose
from qtrain.data.digits import Digits
from qtrain.models.cifar_resnet import cifar_resnet8
from qtrain.packed.header import read
from qtrain.pipeline import predict
from qtrain.pipeline.load_data import load_data
from qtrain.pipeline.prediction_file import Prediction, as_json, writing
from qtrain.pipeline.student_file import load_trained
from qtrain.run_task import run_task
from qtrain.settings.run_files import STUDENT
from qtrain.utils.errors import ConfigError, IncompleteError

MODEL = ["model=cifar_resnet8", "model.width=0.25", "quantize.calibration_batches=1", "logger=none"]
QUIET = ["hydra/job_logging=none", "hydra/hydra_logging=none", "predict.workers=0"]
TESTED = 40
"""Test images of the digits that are evaluated, and predicted as files."""


def weights(folder: Path, channels: int, classes: int) -> str:
    torch.manual_seed(0)
    path = folder / "weights.safetensors"
    save_file(cifar_resnet8(num_classes=classes, in_chans=channels, width=0.25).state_dict(), path)
    return f"model.weights={path}"


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The run of a student of gray digits, not trained, and its accuracy."""
    root = tmp_path_factory.mktemp("digits")
    chosen = ["task=calibrate", "name=made", f"output={root}", "data.max_train=64", f"data.max_test={TESTED}"]
    made = run_task(compose([*MODEL, weights(root, 1, 10), *chosen]))
    return root / "adhoc" / "made", made["top1"]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """The digits that were tested, as PNG files ``<label>/<number>.png``."""
    data = Digits(max_test=TESTED)
    data.setup()
    (batch,) = [batch for batch in data.test_dataloader()]
    pixels = (batch.image[:, 0] * data.info.std[0] + data.info.mean[0]).mul(255).round().byte().numpy()
    for number, (picture, label) in enumerate(zip(pixels, batch.target.tolist(), strict=True)):
        file = tmp_path / "pictures" / str(label) / f"{number:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(file)
    return tmp_path / "pictures"


def call(folder: Path, *argv: str) -> int:
    """The exit code of task=predict, run in this process."""
    try:
        cli.main(["task=predict", f"output={folder / 'outputs'}", *QUIET, *argv])
    except SystemExit as done:
        return int(done.code or 0)
    return 0


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_files_are_predicted_as_accurately_as_evaluated(
    digits: tuple[Path, float], pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, top1 = digits
    assert call(tmp_path, f"model={run}", f"images={pictures}", "predict.batch_size=16") == 0
    found = rows(capsys.readouterr().out)
    assert [row["path"] for row in found] == sorted(map(str, pictures.rglob("*.png")))
    right = sum(row["class_1"] == Path(row["path"]).parent.name for row in found)
    assert 100 * right / TESTED == pytest.approx(top1)
    assert [*found[0]] == ["path", *(f"{what}_{n}" for n in range(1, 6) for what in ("class", "probability"))]


def test_photos_are_cropped_normalized_and_named_as_in_evaluation(tmp_path: Path) -> None:
    """Probabilities equal those of the student on the batches that evaluation sees, bit for bit."""
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 30 + 4 * number, 3), dtype=np.uint8)
        for part in ("train", "val"):
            file = tmp_path / part / ("cat", "dog")[number // 4] / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(file)
    photos = [
        "data=imagefolder", f"data.root={tmp_path}", "data.image_size=16", "data.crop_pct=0.75", "data.workers=0",
        "data.interpolation=bilinear", "data.batch_size=8", f"output={tmp_path}", "name=made",
    ]  # fmt: skip
    settings = compose([*MODEL, weights(tmp_path, 3, 2), *photos, "task=calibrate"])
    run_task(settings)
    file = tmp_path / "adhoc" / "made" / STUDENT
    output = tmp_path / "found.jsonl"
    assert call(tmp_path, f"model={file}", f"images={tmp_path / 'val'}", f"predict.output={output}") == 0
    header, student = load_trained(settings, file)
    assert header.images.classes == ("cat", "dog")
    (batch,) = list(load_data(settings).test_dataloader())
    with torch.no_grad():
        values, numbers = student(batch.image).softmax(dim=1).topk(2)
    for line, value, number in zip(output.read_text().splitlines(), values.tolist(), numbers.tolist(), strict=True):
        top = json.loads(line)["top"]
        assert [one["class"] for one in top] == [header.images.classes[n] for n in number]
        assert [one["probability"] for one in top] == [float(f"{one:.6g}") for one in value]


def test_bad_images_are_named_skipped_and_the_reason_for_exit_code_1(
    digits: tuple[Path, float],
    pictures: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    good = sorted(pictures.rglob("*.png"))[:3]
    cut, text = tmp_path / "cut.png", tmp_path / "a, b = (1).jpg"
    cut.write_bytes(good[0].read_bytes()[:60])
    text.write_text("no image")
    names = ",".join(f'"{file}"' for file in (good[0], cut, good[1], text, good[2]))
    output = tmp_path / "found.csv"
    with caplog.at_level(logging.WARNING, "qtrain"):
        assert call(tmp_path, f"model={digits[0]}", f"images=[{names}]", f"predict.output={output}") == 1
    assert [row["path"] for row in rows(output.read_text())] == list(map(str, good))
    assert f"skipped {cut}: " in caplog.text
    assert f"skipped {text}: no known image format" in caplog.text
    told = capsys.readouterr()
    assert told.err == f"qtrain: skipped 2 of 5 images, which cannot be decoded; predictions: {output}\n"
    assert told.out == ""


def test_no_more_classes_are_shown_than_there_are(digits: tuple[Path, float], pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "found.csv"
    given = [f"model={digits[0] / STUDENT}", f"images={pictures}/3", f"predict.output={output}"]
    assert call(tmp_path, *given, "predict.top_k=12") == 0
    (*_, row) = rows(output.read_text())
    assert sorted(row[f"class_{n}"] for n in range(1, 11)) == [str(n) for n in range(10)]
    assert sum(float(row[f"probability_{n}"]) for n in range(1, 11)) == pytest.approx(1, abs=1e-4)
    assert "class_11" not in row


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["images=PICTURES"], "model: task=predict needs a student; give model=FILE"),
        (["model=nowhere", "images=PICTURES"], "model: there is no file nowhere; give a student.safetensors"),
        (["model=OTHER", "images=PICTURES"], "model: OTHER is no student's file"),
        (["model=RUN"], "images: task=predict needs images"),
        (["model=RUN", "images=nowhere"], "images: there is no file or folder nowhere"),
        (["model=RUN", "images=PICTURES/*.gif"], "images: no image matches PICTURES/*.gif"),
        (["model=RUN", "images=RUN"], "images: the folder RUN has no image, also not in its subfolders (.jpg, "),
        (["model=RUN", "images=PICTURES", "predict.output=a.txt"], "predict.output: must end in .csv or .jsonl"),
        (["model=RUN", "images=PICTURES", "predict.output=THERE"], "predict.output: THERE is there already"),
        (["model=RUN", "images=PICTURES", "predict.top_k=0"], "predict: top_k must be at least 1, got 0"),
        (["model=RUN", "images=PICTURES", "predict.workers=-1"], "predict: workers must be at least 0, got -1"),
    ],
)
def test_bad_input_is_told_in_one_line_before_anything_is_written(
    digits: tuple[Path, float],
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    given: list[str],
    message: str,
) -> None:
    names = {
        "OTHER": tmp_path / "weights.safetensors",
        "RUN": digits[0],
        "PICTURES": pictures,
        "THERE": tmp_path / "a.csv",
    }
    weights(tmp_path, 1, 10)
    names["THERE"].write_text("mine")
    for name, place in names.items():
        given = [word.replace(name, str(place)) for word in given]
        message = message.replace(name, str(place))
    assert call(tmp_path, *given) == 2
    told = capsys.readouterr()
    assert told.err.startswith(f"qtrain: error: {message}")
    assert (told.err.count("\n"), told.out) == (1, "")
    assert names["THERE"].read_text() == "mine"


def test_interrupted_predictions_do_not_look_complete(
    digits: tuple[Path, float],
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = predict.predictions

    def interrupted(*given: Any, **options: Any) -> Iterator[Any]:
        for number, row in enumerate(made(*given, **options)):
            if number == 2:
                raise KeyboardInterrupt
            yield row

    output = tmp_path / "found.csv"
    command = [f"model={digits[0]}", f"images={pictures}", f"predict.output={output}"]
    with monkeypatch.context() as patch:
        patch.setattr(predict, "predictions", interrupted)
        assert call(tmp_path, *command) == 130
    partial = tmp_path / "found.csv.partial"
    assert capsys.readouterr().err == (
        f"qtrain: interrupted after 2 of {TESTED} images; those before are in {partial}\n"
    )
    assert len(rows(partial.read_text())) == 2
    assert not output.exists()
    assert call(tmp_path, *command) == 0
    assert len(rows(output.read_text())) == TESTED
    assert not partial.exists()


def test_outputs_that_are_not_finite_are_an_error(digits: tuple[Path, float], pictures: Path) -> None:
    settings = compose(["task=predict"])
    header, student = load_trained(settings, digits[0] / STUDENT)
    head = next(module for module in reversed(list(student.modules())) if getattr(module, "bias", None) is not None)
    head.bias.data.fill_(float("nan"))
    file = str(next(pictures.rglob("*.png")))
    batches = predict.file_batches([file], predict.transform_of(header.images), batch_size=1, workers=0)
    found = predict.predictions(student, batches, range(10), header.structure, top_k=1, device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"\.png: the student's logits are not finite"):
        list(found)


def test_students_of_other_images_are_refused(digits: tuple[Path, float]) -> None:
    header, _ = read(digits[0] / STUDENT)
    for size in ((4, 8, 8), (3, 8, 16)):
        with pytest.raises(ConfigError, match=r"model: the student takes images of .*; task=predict serves"):
            predict.transform_of(replace(header.images, size=size))


def test_names_that_do_not_fit_the_outputs_are_refused(digits: tuple[Path, float]) -> None:
    header, student = load_trained(compose(["task=predict"]), digits[0] / STUDENT)
    wrong = replace(header, images=replace(header.images, classes=("cat", "dog")))
    with pytest.raises(ConfigError, match="model: the student has 10 outputs, its file names 2 classes"):
        predict.class_names(wrong, student)


def test_outputs_without_names_are_numbered(digits: tuple[Path, float]) -> None:
    header, student = load_trained(compose(["task=predict"]), digits[0] / STUDENT)
    assert list(predict.class_names(header, student)) == [str(digit) for digit in range(10)]
    nameless = replace(header, images=replace(header.images, classes=()))
    assert list(predict.class_names(nameless, student)) == list(range(10))


def test_a_line_of_json_has_names_or_numbers() -> None:
    line = as_json(Prediction("a\n.png", (("cat", 0.75), (3, 1 / 3))))
    assert line.count("\n") == 0
    assert json.loads(line) == {
        "path": "a\n.png",
        "top": [{"class": "cat", "probability": 0.75}, {"class": 3, "probability": 0.333333}],
    }


def test_a_reader_that_has_enough_ends_the_writing_without_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    written: list[int] = []
    with open(write_end, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        with writing(None, top_k=1) as write:
            for number in range(3):
                write(Prediction("a.png", (("cat", 1.0),)))
                written.append(number)
        monkeypatch.undo()
    assert written == [], "the first line finds that nobody reads"


def test_incomplete_work_has_exit_code_1_unless_said_otherwise() -> None:
    assert (IncompleteError("a").exit_code, IncompleteError("a", exit_code=130).exit_code) == (1, 130)
