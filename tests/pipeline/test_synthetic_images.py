"""Low bits without the training data: images from a model, kept, and the closed loop on them."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from qtrain.config.compose import compose
from qtrain.data.digits import Digits
from qtrain.data.synthetic_store import IMAGES_MANIFEST, read_images, read_manifest, write_shard
from qtrain.pipeline.synthetic_images import SyntheticFolder, synthesize_images
from qtrain.run_task import run_task
from qtrain.tasks.report import write_report
from qtrain.utils.errors import ConfigError

MODEL = "model=cifar_resnet8 model.width=0.5".split()
DIGITS = """
    trainer=cpu data=synthetic data@data.test=digits data.image_size=8 data.in_channels=1 data.batch_size=16
    data.crop_padding=1 data.flip=false data.test.max_test=100
    synthesis=bn_statistics synthesis.batch_size=16 synthesis.steps=5 synthesis.shift=1 synthesis.flip=false
    synthesize.images=40 synthesize.workers=1
    quantize.calibration_batches=2 quantize.weight.init=range quantize.input.init=range
    fit.reestimate_bn=0 fit.health_every_steps=0
""".split()


@pytest.fixture(scope="module")
def normal() -> list[str]:
    """The mean and std that the model below is trained with, as overrides."""
    digits = Digits()
    digits.setup()
    return [f"data.test.mean=[{digits.info.mean[0]}]", f"data.test.std=[{digits.info.std[0]}]"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small model that knows digits, in full precision."""
    folder = tmp_path_factory.mktemp("model")
    fit = (
        "quantize.enabled=false fit.epochs=4 optimizer=adam optimizer.lr=0.01 name=fp fit.final_test=false trainer=cpu"
    )
    overrides = [*MODEL, *fit.split(), f"output={folder}", "fit.reestimate_bn=0"]
    run_task(compose(overrides), overrides)
    return str(folder / "adhoc" / "fp" / "student.safetensors")


@pytest.fixture
def overrides(normal: list[str], weights: str, tmp_path: Path) -> list[str]:
    places = [f"synthesize.folder={tmp_path / 'images'}", f"output={tmp_path / 'out'}"]
    return [*DIGITS, *MODEL, *normal, f"model.weights={weights}", *places]


def hashes(synthetic: SyntheticFolder) -> dict[str, str]:
    return dict(synthetic.manifest.files)


def test_images_are_kept_and_found_again(overrides: list[str]) -> None:
    made = synthesize_images(compose(overrides))
    assert made.made == 48, "whole batches"
    again = synthesize_images(compose(overrides))
    assert again.made == 0
    assert again.folder == made.folder
    other = synthesize_images(compose([*overrides, "seed=1"]))
    assert other.folder != made.folder
    assert not set(hashes(other).values()) & set(hashes(made).values())


def test_more_images_of_a_generator_are_not_learned_anew(overrides: list[str], tmp_path: Path) -> None:
    short = ["synthesis=gdfq", "synthesis.width=4", "synthesis.snapshots=1", "synthesis.steps=2"]
    asked = [word for word in overrides if not word.startswith("synthesis.")] + [*short, "synthesis.batch_size=8"]
    few = synthesize_images(compose([*asked, "synthesize.images=8"]))
    (learned,) = (tmp_path / "images").glob("synthetic-digits-learned-*")
    times = {path: path.stat().st_mtime_ns for path in learned.rglob("*") if path.is_file()}
    assert times
    more = synthesize_images(compose([*asked, "synthesize.images=16"]))
    assert more.folder != few.folder
    assert more.made == 16
    assert {path: path.stat().st_mtime_ns for path in learned.rglob("*") if path.is_file()} == times


def test_several_models_of_one_kind_are_all_asked(overrides: list[str], weights: str) -> None:
    def twin(name: str) -> list[str]:
        place = f"synthesize.models.{name}"
        return [f"+model@{place}=cifar_resnet8", f"{place}.width=0.5", f"{place}.weights={weights}"]

    both = synthesize_images(compose([*overrides, *twin("other"), "synthesize.images=16"]))
    assert set(both.manifest.made_from["models"]) == {"cifar_resnet8", "other"}
    assert both.folder != synthesize_images(compose([*overrides, "synthesize.images=16"])).folder
    with pytest.raises(ConfigError, match=r"synthesize.models.cifar_resnet8: is what the model itself is called"):
        synthesize_images(compose([*overrides, *twin("cifar_resnet8")]))


@pytest.mark.slow
def test_two_processes_make_the_images_of_one(overrides: list[str], tmp_path: Path) -> None:
    one = synthesize_images(compose(overrides))
    two = synthesize_images(compose([*overrides, f"synthesize.folder={tmp_path / 'two'}", "synthesize.workers=2"]))
    assert two.made == 48
    assert hashes(two) == hashes(one)


def test_a_stopped_synthesis_makes_what_is_missing(overrides: list[str], caplog: pytest.LogCaptureFixture) -> None:
    whole = synthesize_images(compose(overrides))
    first, second, _ = whole.manifest.checked_files()
    before = hashes(whole)
    (whole.folder / IMAGES_MANIFEST).unlink()
    first.unlink()
    second.write_bytes(second.read_bytes()[:-40])  # cut short by a full disk
    again = synthesize_images(compose(overrides))
    assert again.made == 32
    assert hashes(again) == before
    assert "is damaged" in caplog.text


def test_nodes_share_the_batches_by_rank(overrides: list[str], tmp_path: Path) -> None:
    alone = synthesize_images(compose(overrides))
    shared = [*overrides, f"synthesize.folder={tmp_path / 'shared'}", "synthesize.world_size=2"]
    with pytest.raises(ConfigError, match="1 of 3 batches are still to be made by other ranks"):
        synthesize_images(compose([*shared, "synthesize.rank=0"]))
    last = synthesize_images(compose([*shared, "synthesize.rank=1"]))
    assert last.made == 16
    assert hashes(last) == hashes(alone)
    with pytest.raises(ConfigError, match=r"synthesize.rank: must be in 0\.\.1"):
        synthesize_images(compose([*shared, "synthesize.rank=2", "synthesize.images=100"]))


def test_a_damaged_image_is_named_before_training(overrides: list[str]) -> None:
    made = synthesize_images(compose(overrides))
    victim = made.manifest.checked_files()[1]
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(bytes(content))
    with pytest.raises(ConfigError, match=f"{victim.name} is damaged; delete it"):
        run_task(compose([*overrides, "fit.epochs=1"]))


def test_the_task_leaves_a_row_and_a_picture(overrides: list[str], tmp_path: Path, capsys: Any) -> None:
    metrics = run_task(compose([*overrides, "task=synthesize"]))
    folder = tmp_path / "out" / "adhoc" / "synthesize"
    assert (folder / "results.csv").is_file()
    assert f"data.folder={metrics['folder']}" in capsys.readouterr().out
    manifest = json.loads((Path(metrics["folder"]) / IMAGES_MANIFEST).read_text())
    assert manifest["metrics"]["images"] == 48
    assert manifest["made_from"]["method"]["steps"] == 5
    picture = np.asarray(Image.open(folder / "images.png"))
    first = read_images(read_manifest(metrics["folder"]).checked_files()[0], 1)[0, ..., 0]
    assert (picture[:16:2, :16:2, 0] == first).all(), "the first image, twice as large"


def test_the_closed_loop_needs_no_training_image(overrides: list[str], tmp_path: Path) -> None:
    """Where real images come from there is a test split and nothing else; opening the other would fail."""
    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    root = tmp_path / "real"
    write_shard(root / "test-0.parquet", pixels[:200], digits.target[:200], {})
    real = ["data@data.test=cifar10", f"data.test.root={root}", f"data.test.cache_dir={tmp_path / 'cache'}"]
    loop = [*overrides, *real, "teacher=self", "objective=kl", "fit.epochs=2", "synthesis.steps=20", "optimizer=adam"]
    trained = run_task(compose(loop), loop)
    assert trained["fp_top1"] > 80, "the test images are the digits that the model knows"
    assert trained["ptq_top1"] is not None
    assert trained["top1"] > 80
    run = tmp_path / "out" / "adhoc"
    picture = base64.b64encode((run / "w4a4-distill" / "images.png").read_bytes()).decode()
    page, _, _ = write_report(run)
    assert f"data:image/png;base64,{picture}" in page.read_text()
    calibrated = run_task(compose([*loop, "task=calibrate"]), loop)
    assert calibrated["top1"] == trained["ptq_top1"]
    free = ["task=calibrate", "quantize.fold=before", "quantize.calibration=statistics", "name=dfq"]
    from_nothing = run_task(compose([*loop, *free, f"synthesize.folder={tmp_path / 'never'}"]), loop)
    assert from_nothing["top1"] > 80
    assert not (tmp_path / "never").exists(), "statistics alone need no synthetic image either"


def test_an_evaluation_imagines_nothing(overrides: list[str], tmp_path: Path) -> None:
    loop = [*overrides, "teacher=self", "objective=kl", "fit.epochs=1", "name=run"]
    trained = run_task(compose(loop), loop)
    run = tmp_path / "out" / "adhoc" / "run"
    again = [*loop, "task=evaluate", f"checkpoint={run}", f"synthesize.folder={tmp_path / 'never'}"]
    assert run_task(compose(again), again)["top1"] == trained["top1"]
    assert not (tmp_path / "never").exists()


def test_places_and_workers_are_no_part_of_a_runs_identity(overrides: list[str]) -> None:
    a, b = (compose([*overrides, f"synthesize.folder=/{n}", f"synthesize.workers={n}"]) for n in (1, 2))
    assert a.identity == b.identity
    assert compose([*overrides, "synthesis.steps=6"]).identity != a.identity


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["model.weights=null"], "model.weights: images are synthesized by a trained model; give its weights"),
        (["data.folder=/nowhere"], "data: data.folder: there is no /nowhere/manifest.json"),
        (["data.num_classes=1"], "data: SyntheticImages: num_classes must be at least 2, got 1"),
        (["data.test.mean=null", "data.test.std=null"], "mean and std"),
        (["data.image_size=9"], r"data.test: digits has \(num_classes, image_size, in_channels\) \(10, 8, 1\)"),
        (["task=calibrate", "quantize.enabled=false"], "quantize.enabled: task=calibrate quantizes"),
    ],
)
def test_mistakes_end_in_one_line(overrides: list[str], more: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cfg = compose([*overrides, "synthesize.images=16", *more])
        run_task(cfg)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["task=synthesize"], "data: task=synthesize makes images for data=synthetic"),
        (["data=synthetic"], "synthesis: no method; take synthesis=bn_statistics, or give data.folder"),
        (["data=synthetic", "synthesis=bn_statistics"], "model.weights: images are synthesized by a trained model"),
    ],
)
def test_what_is_lacking_is_said(given: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_task(compose(given))
