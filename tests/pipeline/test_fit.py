"""What the settings of a fit do to it."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qtrain
from qtrain.config.compose import compose
from qtrain.convert.layers import quantizers_of
from qtrain.distillation.hard import Hard
from qtrain.distillation.objective import Objective
from qtrain.pipeline.fit import fit
from qtrain.pipeline.load_data import load_data
from qtrain.schedules.constant import Constant
from qtrain.training.module import QATModule
from qtrain.utils.errors import ConfigError


def trained_by_labels(student: nn.Module) -> QATModule:
    return QATModule(
        student=student,
        objective=Objective(terms={"hard": Hard()}),
        teacher=None,
        optimizer=partial(torch.optim.SGD, lr=0.1),
        lr_schedule=Constant(value=1.0),
        num_classes=10,
        seed=0,
    )


def moved_in_one_step(folder: Path, clip_norm: str) -> float:
    """By how much all parameters together moved in one step of plain gradient descent at rate 0.1."""
    settings = compose([
        "trainer=cpu", "data.max_train=16", "data.max_test=16", "data.batch_size=16", "fit.epochs=1",
        f"fit.clip_norm={clip_norm}", "fit.health_every_steps=0", "fit.weight_average=null",
    ])  # fmt: skip
    torch.manual_seed(0)
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    before = nn.utils.parameters_to_vector(student.parameters()).detach().clone()
    module = trained_by_labels(student)
    result = fit(settings, module=module, data=load_data(settings), folder=folder, identity="x", epochs=1, title="x")
    assert result.state.end.step == 1
    return float((nn.utils.parameters_to_vector(student.parameters()).detach() - before).norm())


def test_clip_norm_bounds_the_gradient_of_all_parameters(tmp_path: Path) -> None:
    """A step is the rate times the gradient, whose norm is 0.01 at the most."""
    assert moved_in_one_step(tmp_path / "free", "null") > 0.05
    assert moved_in_one_step(tmp_path / "clipped", "0.01") == pytest.approx(0.1 * 0.01, rel=1e-3)


def student_after(folder: Path, precision: str, **quantizers: Any) -> nn.Module:
    """A small student of 12 bits that was trained in ``precision``."""
    settings = compose([
        "trainer=cpu", "data.max_train=16", "data.max_test=16", "data.batch_size=16", "fit.epochs=1",
        f"fit.precision={precision}", "fit.health_every_steps=0", "fit.weight_average=null",
    ])  # fmt: skip
    data = load_data(settings)
    images = next(iter(data.test_dataloader())).image
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    student = qtrain.quantize(network, images, weight_bits=12, input_bits=12, ends=None, **quantizers)
    module = trained_by_labels(student)
    return fit(settings, module=module, data=data, folder=folder, identity="x", epochs=1, title="x").student


def test_a_student_of_many_bits_that_was_trained_in_16_can_be_written(tmp_path: Path) -> None:
    """bf16 rounds 2047, the highest of 12 bits, to 2048."""
    student = student_after(tmp_path, "bf16-true")
    for quantizer in quantizers_of(student).values():
        assert float(quantizer.code_high) in (2047, 4095)
        values = torch.full(tuple(quantizer.spec.shape or (4,)), 1e3)
        assert int(quantizer.quantize(values).codes.max()) == int(quantizer.code_high)


def test_a_scaled_loss_is_refused_beside_penalties(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"fit\.precision: 16-mixed scales the loss, and not what PACT adds"):
        student_after(tmp_path, "16-mixed", input="pact")
