"""PROFIT's metric: its formula by another way, and that measuring it changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from qtrain.quantizers.base import Quantizer
from qtrain.tracking.loggers import JsonlLogger
from qtrain.tracking.metric_log import MetricLog
from qtrain.training.callbacks.instability import Instability, gaussian_divergence, instability, layer_moments
from qtrain.utils.json_lines import read_metrics

Make = Callable[..., nn.Sequential]


def test_gaussian_divergence_matches_the_integral() -> None:
    p = torch.distributions.Normal(torch.tensor(0.3).double(), torch.tensor(1.2).double())
    q = torch.distributions.Normal(torch.tensor(-0.5).double(), torch.tensor(0.7).double())
    x = torch.linspace(-20, 20, 400_001, dtype=torch.float64)
    integral = torch.trapezoid(p.log_prob(x).exp() * (p.log_prob(x) - q.log_prob(x)), x)
    torch.testing.assert_close(gaussian_divergence(p.mean, p.variance, q.mean, q.variance), integral)
    assert gaussian_divergence(p.mean, p.variance, p.mean, p.variance) == 0


def test_instability_matches_a_value_computed_by_hand(make_student: Make, images: Tensor) -> None:
    """One weight moves by a code: its channel's output is as computed here, that of the other is as before."""
    student = make_student().eval()
    conv: Any = student[0]
    seen = layer_moments(student, images)
    x = conv.input_quantizer(images)
    before = nn.functional.conv2d(x, conv.weight_quantizer(conv.weight), conv.bias).double()
    with torch.no_grad():
        conv.weight[1, 0, 1, 1] += conv.weight_quantizer.scale.item()
    after = nn.functional.conv2d(x, conv.weight_quantizer(conv.weight), conv.bias).double()
    assert torch.equal(before[:, 0], after[:, 0]) and not torch.equal(before[:, 1], after[:, 1])

    def normal(y: Tensor) -> torch.distributions.Normal:
        return torch.distributions.Normal(y.mean(), y.std(correction=0))

    moved = torch.distributions.kl_divergence(normal(before[:, 1]), normal(after[:, 1])).item()
    metrics = dict(zip(seen, instability(student, seen).tolist(), strict=True))
    assert metrics == {"0": pytest.approx(moved / 2), "5": 0.0}, "the layer behind it saw the same input"


def test_weight_change_within_a_code_has_zero_instability(make_student: Make, images: Tensor) -> None:
    student = make_student()
    conv: Any = student[0]
    seen = layer_moments(student, images)
    with torch.no_grad():
        conv.weight.copy_(conv.weight_quantizer.quantize(conv.weight).dequantize())  # to the middle of each code
    assert instability(student, seen).tolist() == [0.0, 0.0]


def test_dead_channel_has_finite_instability(make_student: Make, images: Tensor) -> None:
    student = make_student()
    conv: Any = student[0]
    with torch.no_grad():
        conv.weight[0] = 0
    seen = layer_moments(student, images)
    with torch.no_grad():
        conv.weight[0] = 1
    assert torch.isfinite(instability(student, seen)).all()


def test_layer_moments_changes_nothing_in_the_model(make_student: Make, images: Tensor) -> None:
    student = make_student().train()
    student[3].eval()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    generator = torch.random.get_rng_state()
    instability(student, layer_moments(student, images))
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    assert [module.training for module in student] == [True, True, True, False, True, True]
    assert not any(module._forward_pre_hooks for module in student.modules())
    assert all(quantizer.enabled for quantizer in student.modules() if isinstance(quantizer, Quantizer))


def test_frozen_and_unquantized_layers_are_not_measured(make_student: Make, images: Tensor) -> None:
    student = make_student()
    conv, linear = student[0], student[5]
    conv.weight.requires_grad_(False)
    assert list(layer_moments(student, images)) == ["5"]
    linear.weight_quantizer.enabled = False  # type: ignore[union-attr]
    assert layer_moments(student, images) == {}
    assert instability(student, {}).shape == (0,)


class Witness(pl.Callback):
    """Measures every step, without the callback's bookkeeping."""

    def __init__(self, images: int) -> None:
        self.images = images
        self.found: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen = layer_moments(pl_module.student, batch[0][: self.images])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.found.append(dict(zip(self.seen, instability(pl_module.student, self.seen).tolist(), strict=True)))


def test_instability_callback_measures_every_n_steps(
    make_student: Make, fit_three_steps: Callable[..., Any], tmp_path: Path
) -> None:
    witness = Witness(images=3)
    metrics = {}
    for every in (1, 2):
        metric_log = MetricLog(loggers=[JsonlLogger(folder=tmp_path / str(every))], every_n_steps=1)
        callback = Instability(metric_log=metric_log, every_n_steps=every, images=3)
        fit_three_steps(make_student(), [callback, witness, metric_log])
        metrics[every] = callback.metrics()
    first, second = witness.found[:3], witness.found[3:]
    assert first == second and max(first[1].values()) > 0
    assert metrics[2] == pytest.approx(second[1])
    for name in ("0", "5"):
        assert metrics[1][name] == pytest.approx(sum(found[name] for found in first) / 3)
    (row,) = [row for row in read_metrics(tmp_path / "2" / "metrics.jsonl")[0] if "instability/0" in row]
    assert row["step"] == 2 and row["instability/5"] == pytest.approx(second[1]["5"])


def test_instability_measurement_does_not_change_training(
    make_student: Make, fit_three_steps: Callable[..., Any]
) -> None:
    ends = []
    for measure in (False, True):
        student, metric_log = make_student(), MetricLog(loggers=[])
        fit_three_steps(student, [Instability(metric_log=metric_log, every_n_steps=1)] if measure else [])
        ends.append(student.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_batch_without_a_step_is_not_measured(make_student: Make, fit_three_steps: Callable[..., Any]) -> None:
    """Of three batches the second ends a step; the third is the rest of an epoch."""
    callback = Instability(metric_log=MetricLog(loggers=[]), every_n_steps=1)
    fit_three_steps(make_student(), [callback], accumulate_grad_batches=2)
    assert callback.state_dict()["count"] == 1


def test_instability_state_is_restored_from_a_checkpoint(
    make_student: Make, fit_three_steps: Callable[..., Any]
) -> None:
    metric_log = MetricLog(loggers=[])
    whole, again = Instability(metric_log=metric_log, every_n_steps=1), Instability(metric_log=metric_log)
    fit_three_steps(make_student(), [whole])
    assert again.metrics() == {}
    again.load_state_dict(whole.state_dict())
    assert again.metrics() == whole.metrics() and set(whole.metrics()) == {"0", "5"}


@pytest.mark.parametrize("option", ["every_n_steps", "images"])
def test_wrong_options(option: str) -> None:
    with pytest.raises(ValueError, match=f"Instability: {option} must be at least 1, got 0"):
        Instability(metric_log=MetricLog(loggers=[]), **{option: 0})
