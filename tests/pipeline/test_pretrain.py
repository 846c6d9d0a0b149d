"""Full-precision weights are trained by their own recipe."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qtrain.config.compose import compose
from qtrain.data.base import VisionData
from qtrain.pipeline import pretrain
from qtrain.pipeline.fit import accumulated_batches
from qtrain.pipeline.load_data import load_data
from qtrain.settings.run_settings import RunSettings


class BeganError(Exception):
    """The fit was about to begin."""


FEW = ["model=cifar_resnet8", "data.max_train=64", "data.max_test=16", "data.batch_size=16", "data.labeled=32"]


@pytest.mark.parametrize("all_labels, batches", [(False, 2), (True, 4)])
def test_pretraining_has_the_labels_that_it_is_given(
    all_labels: bool, batches: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody teaches on the images without a label, so they are left out; or it sees the labels that are hidden."""
    seen: list[VisionData] = []

    def begin(settings: RunSettings, *, data: VisionData, **given: Any) -> None:
        seen.append(data)
        raise BeganError

    monkeypatch.setattr(pretrain, "fit", begin)
    own = [f"full_precision.folder={tmp_path}", f"full_precision.all_labels={all_labels}"]
    settings = compose([*FEW, *own])
    data = load_data(settings)
    with pytest.raises(BeganError):
        pretrain.full_precision_weights(settings.model, settings, data)
    targets = [batch.target for batch in seen[0].train_dataloader()]
    assert len(targets) == batches and min(int(target.min()) for target in targets) >= 0
    assert len(data.train_dataloader()) == 4, "the run's own data are as they were"


def test_weights_that_see_all_labels_are_kept_for_any_number_of_them(tmp_path: Path) -> None:
    def kept(*own: str) -> str:
        settings = compose([*FEW, f"full_precision.folder={tmp_path}", *own])
        return pretrain._kept(settings.model, settings, load_data(settings))[0]

    assert kept("full_precision.all_labels=true") == kept("data.labeled=null") != kept()


def test_pretraining_does_not_accumulate_the_gradients_of_the_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[RunSettings] = []

    def begin(settings: RunSettings, **given: Any) -> None:
        seen.append(settings)
        raise BeganError

    monkeypatch.setattr(pretrain, "fit", begin)
    own = [f"full_precision.folder={tmp_path}", "model=cifar_resnet8", "data.max_train=64", "data.max_test=16"]
    settings = compose([*own, "trainer.accumulate_grad_batches=4", "+callback@callbacks.bits=bits"])
    with pytest.raises(BeganError):
        pretrain.full_precision_weights(settings.model, settings, load_data(settings))
    assert accumulated_batches(settings) == 4
    assert [accumulated_batches(one) for one in seen] == [1]
    assert seen[0].callbacks == {}


def test_weights_are_those_of_the_images_and_not_of_their_folders_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two projects have a folder ``images``; what is trained on one is nothing for the other, nor for new images."""

    def kept(project: str, *own: str) -> str:
        monkeypatch.chdir(tmp_path / project)
        options = ["data=imagefolder", "data.root=images", "data.image_size=16", "data.workers=0"]
        settings = compose([*options, "model=cifar_resnet8", f"full_precision.folder={tmp_path}", *own])
        return pretrain._kept(settings.model, settings, load_data(settings))[0]

    for seed, project in enumerate(("one", "other", "swapped")):
        for part in ("train", "val"):
            for place, name in enumerate(("black", "white")):
                folder = tmp_path / project / "images" / part / name
                folder.mkdir(parents=True)
                shade = np.random.default_rng([seed % 2, place ^ (project == "swapped")]).integers(0, 255, (16, 16, 3))
                Image.fromarray(shade.astype(np.uint8)).save(folder / "0.png")
    keys = [kept(project) for project in ("one", "other", "swapped")]
    assert len(set(keys)) == 3
    assert kept("one", "data.workers=1", "data.eval_batch_size=8", "data.check=true") == keys[0]
    (tmp_path / "one").rename(tmp_path / "moved")
    assert kept("moved") == keys[0]
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "moved" / "images" / "train" / "black" / "0.png")
    assert kept("moved") not in keys
