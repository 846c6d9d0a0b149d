"""Known metrics on real images: the public CIFAR ResNets, evaluated and calibrated by the tasks themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qtrain.config.compose import compose
from qtrain.run_task import run_task

pytestmark = pytest.mark.slow


def run(task: str, shared_data: Path, folder: Path, *more: str) -> dict[str, Any]:
    overrides = [
        "+experiment=cifar10/resnet20_w8a8",
        f"task={task}",
        f"data.root={shared_data / 'cifar10'}",
        f"model.weights={shared_data / 'weights' / 'resnet20-12fca82f.th'}",
        f"output={folder}",
        *more,
    ]
    return run_task(compose(overrides), overrides)


def test_resnet20_in_full_precision_and_calibrated_to_eight_bits(shared_data: Path, tmp_path: Path) -> None:
    metrics = run("calibrate", shared_data, tmp_path)
    assert metrics["fp_top1"] == pytest.approx(91.73, abs=0.005)
    assert metrics["top1"] == pytest.approx(91.73, abs=0.2)


def test_resnet56_in_full_precision(shared_data: Path, tmp_path: Path) -> None:
    """On the first 2,000 of the test images, for time; on all of them it is the published 93.39 %."""
    weights = shared_data / "weights" / "resnet56-4bfd9763.th"
    more = ["model=cifar_resnet56", f"model.weights={weights}", "data.max_test=2000"]
    metrics = run("evaluate", shared_data, tmp_path, *more)
    assert metrics["fp_top1"] == pytest.approx(93.55, abs=0.06)
