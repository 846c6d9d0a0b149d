"""The folder of a run that takes seconds: a calibrated student of random weights, on real images."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qtrain.config.compose import compose
from qtrain.models.cifar_resnet import cifar_resnet8
from qtrain.run_task import run_task

QUICK = ["quantize.calibration_batches=1", "data.max_train=64", "data.max_test=50", "data.batch_size=32", "logger=none"]
"""Few of the embedded digits."""


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each file of tests, which may add to it."""
    folder = tmp_path_factory.mktemp("calibrated")
    torch.manual_seed(0)
    weights = folder / "small.safetensors"
    save_file(cifar_resnet8(num_classes=10, in_chans=1, width=0.25).state_dict(), weights)
    model = ["model=cifar_resnet8", "model.width=0.25", f"model.weights={weights}"]
    run_task(compose(["task=calibrate", "name=made", f"output={folder / 'outputs'}", *model, *QUICK]))
    return folder / "outputs" / "adhoc" / "made"
