"""A network, a teacher and data that know nothing of qtrain, through whole runs."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qtrain.config.compose import AD_HOC, compose
from qtrain.pipeline.build_model import build_model, network_of
from qtrain.pipeline.load_data import load_data
from qtrain.pipeline.pretrain import full_precision_weights, must_train
from qtrain.run_task import run_task
from qtrain.settings.run_files import STUDENT
from qtrain.utils.errors import ConfigError
from tests.helpers.own_package import own_package

TINY = """
    trainer=cpu logger=none data.batch_size=16 fit.epochs=1 full_precision.epochs=1 fit.reestimate_bn=1
    quantize.calibration_batches=1 fit.health_every_steps=0 data=own data.workers=0
""".split()
PLAIN = ["model=own", "model.builder=ownrun.networks.Plain", "data.builder=ownrun.images.pictures"]
ADMITTED = "allow_targets=[ownrun]"


@pytest.fixture(scope="module", autouse=True)
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("own")
    with own_package(folder, "ownrun"):
        yield folder


def overrides(folder: Path, *more: str) -> list[str]:
    return [*TINY, f"output={folder / 'outputs'}", f"full_precision.folder={folder / 'cache'}", *more]


def run(folder: Path, *more: str) -> dict[str, Any]:
    given = overrides(folder, *more)
    return run_task(compose(given), given)


def evaluate(folder: Path, *more: str) -> dict[str, Any]:
    given = ["task=evaluate", "logger=none", f"output={folder / 'outputs'}", *more]
    return run_task(compose(given), given)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run of a network without arguments that calls ``view``, and what it returned."""
    folder = tmp_path_factory.mktemp("trained")
    return folder, run(folder, *PLAIN, "name=plain")


def test_a_network_without_arguments_that_calls_view_is_trained(trained: tuple[Path, dict[str, Any]]) -> None:
    folder, metrics = trained
    assert all(0 <= metrics[name] <= 100 for name in ("top1", "fp_top1", "ptq_top1"))
    summary = json.loads((folder / "outputs" / AD_HOC / "plain" / "summary.json").read_text())
    assert (summary["model"], summary["dataset"], summary["w_bits"]) == ("Plain", "images.pictures", 8)
    (kept,) = (folder / "cache").iterdir()
    assert kept.name.startswith("images.pictures-Plain-")


def test_its_student_is_evaluated_from_the_folder_and_from_the_file(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder = trained[0] / "outputs" / AD_HOC / "plain"
    assert evaluate(tmp_path, f"checkpoint={folder}", ADMITTED) == {"top1": trained[1]["top1"]}
    (row,) = csv.DictReader((tmp_path / "outputs" / AD_HOC / "evaluate" / "results.csv").open())
    assert row["model"] == "Plain"
    with pytest.raises(ConfigError, match=r"(model|data)\.builder: 'ownrun\..*' is not admitted"):
        evaluate(tmp_path, f"checkpoint={folder}")
    (tmp_path / STUDENT).write_bytes((folder / STUDENT).read_bytes())
    alone = [f"checkpoint={tmp_path / STUDENT}", "data=own", "data.builder=ownrun.images.pictures"]
    assert evaluate(tmp_path, *alone, ADMITTED) == {"top1": trained[1]["top1"]}
    with pytest.raises(ConfigError, match=r"names code that is not qtrain's, ownrun\.networks\.Plain; .*allow_t"):
        evaluate(tmp_path, *alone)


def test_its_export_passes_and_takes_one_image(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """A gray image has the strides of both memory formats, and ``view`` takes one of them only."""
    folder = trained[0] / "outputs" / AD_HOC / "plain"
    shipped = tmp_path / "shipped"
    own = (f"checkpoint={folder}", ADMITTED, "logger=none", f"export.output={shipped}")
    for task in ("export", "verify"):
        given = [f"task={task}", *own]
        run_task(compose(given), given)
        assert json.loads((shipped / "verify.json").read_text())["passed"]


def test_a_look_before_training_takes_a_network_that_calls_view(tmp_path: Path) -> None:
    run(tmp_path, *PLAIN, "task=lint", "target=onnxruntime")


def test_a_class_with_options_learns_from_a_teacher_of_ones_own(tmp_path: Path) -> None:
    metrics = run(
        tmp_path, "model=own", "model.builder=ownrun.networks.Wide", "+model.options.width=3", "objective=soft",
        "teacher=own", "teacher.model.builder=ownrun.build", "+teacher.model.options.width=8",
        "data.builder=ownrun.images.floats", "data.num_classes=10", "name=wide",
    )  # fmt: skip
    assert metrics["top1"] is not None
    summary = json.loads((tmp_path / "outputs" / AD_HOC / "wide" / "summary.json").read_text())
    assert (summary["model"], summary["distill"]) == ("Wide", "soft")
    assert sorted(path.name.rpartition("-")[0] for path in (tmp_path / "cache").iterdir()) == [
        "images.floats-Wide",
        "images.floats-ownrun.build",
    ]


def test_trained_weights_are_evaluated_and_calibrated(tmp_path: Path) -> None:
    from ownrun.networks import Plain  # type: ignore[import-not-found]

    torch.manual_seed(0)
    save_file(Plain().state_dict(), tmp_path / "plain.safetensors")
    own = [*PLAIN, f"model.weights={tmp_path / 'plain.safetensors'}"]
    measured = run(tmp_path, *own, "task=evaluate")
    calibrated = run(tmp_path, *own, "task=calibrate", "name=calibrated")
    assert calibrated["fp_top1"] == measured["fp_top1"]
    assert not (tmp_path / "cache").exists()


def test_a_builder_may_give_a_trained_network(tmp_path: Path) -> None:
    run(tmp_path, *PLAIN, "model.pretrained=true", "task=calibrate", "name=pretrained")
    with pytest.raises(ConfigError, match=r"model\.weights: calibration needs a trained model"):
        run(tmp_path, *PLAIN, "task=calibrate", "name=untrained")


def test_a_config_without_name_and_partial_builds_a_class_by_its_target(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("# mine\n_target_: ownrun.networks.Plain\n")
    mine = [f"hydra.searchpath=[file://{tmp_path}]", "model=mine", ADMITTED, "data.builder=ownrun.images.pictures"]
    metrics = run(tmp_path, *mine, "name=raw")
    summary = json.loads((tmp_path / "outputs" / AD_HOC / "raw" / "summary.json").read_text())
    assert summary["model"] == "Plain"
    folder = tmp_path / "outputs" / AD_HOC / "raw"
    assert evaluate(tmp_path, f"checkpoint={folder}", ADMITTED) == {"top1": metrics["top1"]}


def test_kept_weights_are_those_of_the_code_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ownrun.networks as networks

    settings = compose(overrides(tmp_path, *PLAIN))
    data = load_data(settings)
    first = full_precision_weights(settings.model, settings, data)
    assert first is not None and not must_train(settings.model, settings, data)
    monkeypatch.setattr(networks, "Plain", networks.Wide)
    assert must_train(settings.model, settings, data), "another network under the same name"
    monkeypatch.undo()
    monkeypatch.setattr("ownrun.images.LABELS", networks.torch.arange(96).numpy() % 7)
    assert must_train(settings.model, settings, load_data(settings)), "other labels from the same builder"
    monkeypatch.undo()
    assert not must_train(settings.model, settings, load_data(settings))


def test_a_student_says_how_its_network_is_built_again(tmp_path: Path) -> None:
    settings = compose(
        overrides(tmp_path, "model=own", "model.builder=ownrun.networks.Wide", "data.builder=ownrun.images.pictures")
    )
    info = load_data(settings).info
    network = network_of(settings.model, info)
    assert network.builder == "ownrun.networks.Wide"
    assert network.options == {"num_classes": 10, "in_channels": 1}
    assert info.classes == tuple(f"digit {number}" for number in range(10))


def test_memory_format_of_a_run_is_one_for_its_models_and_images(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="qtrain"):
        run(
            tmp_path, "model=own", "model.builder=ownrun.networks.Wide", "objective=soft", "teacher=own",
            "teacher.model.builder=ownrun.networks.Plain", "data.builder=ownrun.images.pictures",
        )  # fmt: skip
    (said,) = [record.message for record in caplog.records if "contiguous" in record.message]
    assert said.startswith("Plain: stays contiguous in memory, and so do its images"), "the student came before it"


def test_a_network_that_calls_view_needs_no_setting_with_contiguous_images(tmp_path: Path) -> None:
    settings = compose(overrides(tmp_path, *PLAIN, "fit.channels_last=false"))
    data = load_data(settings)
    assert data.channels_last is False
    (batch,) = data.calibration_batches(1)
    assert build_model(settings.model, data.info).eval()(batch.image).shape == (16, 10)
