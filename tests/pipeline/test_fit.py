"""What the settings of a fit do to it."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from qtrain.config.compose import compose
from qtrain.distillation.hard import Hard
from qtrain.distillation.objective import Objective
from qtrain.pipeline.fit import fit
from qtrain.pipeline.load_data import load_data
from qtrain.schedules.constant import Constant
from qtrain.training.module import QATModule


def moved_in_one_step(folder: Path, clip_norm: str) -> float:
    """By how much all parameters together moved in one step of plain gradient descent at rate 0.1."""
    settings = compose([
        "trainer=cpu", "data.max_train=16", "data.max_test=16", "data.batch_size=16", "fit.epochs=1",
        f"fit.clip_norm={clip_norm}", "fit.health_every_steps=0", "fit.weight_average=null",
    ])  # fmt: skip
    torch.manual_seed(0)
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    before = nn.utils.parameters_to_vector(student.parameters()).detach().clone()
    module = QATModule(
        student=student,
        objective=Objective(terms={"hard": Hard()}),
        teacher=None,
        optimizer=partial(torch.optim.SGD, lr=0.1),
        lr_schedule=Constant(value=1.0),
        num_classes=10,
        seed=0,
    )
    result = fit(settings, module=module, data=load_data(settings), folder=folder, identity="x", epochs=1, title="x")
    assert result.state.end.step == 1
    return float((nn.utils.parameters_to_vector(student.parameters()).detach() - before).norm())


def test_clip_norm_bounds_the_gradient_of_all_parameters(tmp_path: Path) -> None:
    """A step is the rate times the gradient, whose norm is 0.01 at the most."""
    assert moved_in_one_step(tmp_path / "free", "null") > 0.05
    assert moved_in_one_step(tmp_path / "clipped", "0.01") == pytest.approx(0.1 * 0.01, rel=1e-3)
