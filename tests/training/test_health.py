"""Health of quantizers: each metric by another way, collapses that are planted, and what stays as it was."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qtrain.functional.losses import soft_target_loss
from qtrain.nn import QuantLinear
from qtrain.observers.min_max import MinMax
from qtrain.quantizers.codebook.apot import APoT
from qtrain.quantizers.uniform.lsq import LSQ
from qtrain.quantizers.uniform.lsq_plus import LSQPlus
from qtrain.quantizers.wrappers.oscillation import Oscillation
from qtrain.spec import PerTensor, QuantSpec
from qtrain.storage.affine import AffineTensor
from qtrain.tracking.loggers import JsonlLogger
from qtrain.tracking.metric_log import MetricLog
from qtrain.training.callbacks.health import Health
from qtrain.training.health import Examination, clipped_fraction, dead_levels, examine, gradient_ratio, symptoms
from qtrain.training.resume import ResumePoints
from qtrain.utils.json_lines import read_metrics

Make = Callable[..., nn.Sequential]
Fit = Callable[..., Any]


def lsq(bits: int, scale: float = 1.0) -> LSQ:
    quantizer = LSQ(spec=QuantSpec(bits=bits))
    nn.init.constant_(quantizer.scale, scale)
    return quantizer


def set_scale(layer: Any, part: str, factor: float) -> None:
    """Multiply the scale of a layer's weight or input quantizer."""
    quantizer = getattr(layer, f"{part}_quantizer")
    with torch.no_grad():
        quantizer.scale.mul_(factor)


# ---- metrics


def test_clipped_fraction_counts_values_outside_of_the_range() -> None:
    x = torch.tensor([-5.0, -4.4, -1.5, 0.0, 2.5, 3.2, 3.6, 100.0])  # codes -4..3
    stored = lsq(3).quantize(x)
    assert isinstance(stored, AffineTensor) and clipped_fraction(stored, x) == 3 / 8


@pytest.mark.parametrize("kind", [LSQ, APoT, LSQPlus])
def test_negatives_that_an_unsigned_input_clips_are_counted_and_have_a_remedy(kind: Any) -> None:
    """Calibration saw 0 to 3; later values are -3, -1, -0.01 (which rounds to 0), 0, 1, ..., 5."""
    layer = QuantLinear(source=nn.Linear(1, 2))
    layer.input_quantizer = kind(spec=QuantSpec(bits=2))
    observer = MinMax(granularity=PerTensor())
    observer.update(torch.tensor([[0.0], [3.0]]))
    layer.input_quantizer.calibrate_(observer.observed(2))
    with torch.no_grad():
        layer.input_quantizer.scale.fill_(1.0)
    x = torch.tensor([-3.0, -1.0, -0.01, 0.0, 1.0, 2.0, 3.0, 5.0]).unsqueeze(1)
    found = examine(nn.Sequential(layer), x)
    signs = [s for s in symptoms(found, {}, images=8, classes=2) if s.kind == "negative"]
    if kind is LSQPlus:  # its offset is learned, so that its range may reach below zero
        assert "negative/0.input" not in found.metrics and not signs
        return
    assert found.metrics["negative/0.input"] == 2 / 8
    assert signs[0].place == "0.input" and "calibration_batches" in signs[0].remedy and "25 %" in signs[0].says


def test_negatives_of_a_signed_input_are_not_counted(make_student: Make, images: Tensor) -> None:
    assert "negative/0.input" not in examine(make_student(), images * 10).metrics


def test_dead_levels_are_the_share_of_unused_codes() -> None:
    x = torch.tensor([-4.0, -3.9, 0.2, 0.0, 3.0, 3.0, 3.0, 1.0, 1.1])  # of -4..3: -4, 0, 1, 3
    assert dead_levels(lsq(3).quantize(x)) == 4 / 8
    assert dead_levels(lsq(8).quantize(x[:3])) == pytest.approx(1 / 3), "three values can have three levels at most"


def test_gradient_ratio_matches_a_value_computed_by_hand() -> None:
    """LSQ's R: gradients 3 and (3, 4), sizes 2 and 10, so (3 / 2) / (5 / 10)."""
    quantizer, weight = lsq(4, scale=2.0), nn.Parameter(torch.tensor([6.0, 8.0]))
    assert gradient_ratio(quantizer, weight) is None
    quantizer.scale.grad, weight.grad = torch.full_like(quantizer.scale, -3.0), torch.tensor([3.0, 4.0])
    ratio = gradient_ratio(quantizer, weight)
    assert ratio is not None and ratio.item() == pytest.approx(3.0)


def test_examine_measures_each_place_and_changes_nothing(make_student: Make, images: Tensor) -> None:
    student = make_student().train()
    conv: Any = student[0]
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    found = examine(student, images * 2)
    kinds = ("error", "zeros", "dead", "scale", "clipped")
    assert set(found.metrics) == {f"{kind}/{place}" for kind in kinds for place in ("0.weight", "0.input", "5.weight")}
    assert found.bits == {"0.weight": 4, "0.input": 4, "5.weight": 4} and set(found.codes) == {"0.weight", "5.weight"}
    x, rounded = images * 2, conv.input_quantizer(images * 2)
    assert found.metrics["error/0.input"] == pytest.approx(((rounded - x).norm() / x.norm()).item() ** 2, rel=1e-5)
    assert found.metrics["zeros/0.input"] == pytest.approx((rounded == 0).float().mean().item())
    assert found.metrics["dead/0.input"] == pytest.approx(1 - len(rounded.unique()) / 16)
    assert found.metrics["scale/0.weight"] == pytest.approx(conv.weight_quantizer.scale.item())
    assert 0 < found.metrics["clipped/0.input"] < 0.5  # images twice as large as those calibrated on
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    assert all(module.training for module in student.modules())
    assert not any(module._forward_pre_hooks for module in student.modules())
    assert examine(nn.Linear(4, 2), images).metrics == {}


def test_flipped_is_the_share_of_codes_changed_since_the_last_examination(make_student: Make, images: Tensor) -> None:
    student = make_student()
    conv: Any = student[0]
    with torch.no_grad():
        conv.weight[0, 0, 0, :2] = 3 * conv.weight_quantizer.scale
    first = examine(student, images)
    with torch.no_grad():
        conv.weight[0, 0, 0, :2] *= -1
        conv.weight[1] += 1e-7  # moves, but not to other codes
    second = examine(student, images, former=first.codes)
    assert second.metrics["flipped/0.weight"] == pytest.approx(2 / 18) and second.metrics["flipped/5.weight"] == 0
    conv.weight_quantizer.set_range_(bits=2, signed=True)
    assert "flipped/0.weight" not in examine(student, images, former=second.codes).metrics, "other codes, other bits"


def test_counted_oscillation_replaces_flipped(make_student: Make, images: Tensor) -> None:
    student = make_student()
    conv: Any = student[0]
    conv.weight_quantizer = Oscillation(spec=QuantSpec(bits=4, shape=tuple(conv.weight.shape)), quantizer=LSQ)
    conv.weight_quantizer.frequency[0, 0, 0] = 0.5  # three weights of 18
    found = examine(student, images)
    found = examine(student, images, former=found.codes)
    assert found.metrics["oscillating/0.weight"] == pytest.approx(3 / 18)
    assert "flipped/0.weight" not in found.metrics and "flipped/5.weight" in found.metrics


def test_agreement_with_the_teacher(make_student: Make, images: Tensor) -> None:
    student = make_student().eval()
    logits = student(images).detach()
    teacher = logits.clone()
    teacher[:3] = teacher[:3].roll(1, dims=1)  # another class is the highest
    found = examine(student, images, teacher_logits=teacher)
    assert found.metrics["agreement"] == pytest.approx(75.0)
    assert found.metrics["teacher_kl"] == pytest.approx(soft_target_loss(logits, teacher, 1.0).item())
    same = examine(student, images, teacher_logits=logits).metrics
    assert same["agreement"] == 100 and same["teacher_kl"] == pytest.approx(0, abs=1e-6)


# ---- symptoms


def kinds(student: nn.Module, images: Tensor, first: dict[str, float] | None = None) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for symptom in symptoms(examine(student, images), first or {}, images=len(images), classes=3):
        found.setdefault(symptom.place, set()).add(symptom.kind)
        assert re.search(r"\d|all", symptom.says) and symptom.remedy
    return found


def test_healthy_student_has_no_symptoms(make_student: Make, images: Tensor) -> None:
    for bits in (2, 3, 4, 8):
        student = make_student(bits)
        first = {place: examine(student, images).metrics[f"scale/{place}"] for place in ("0.weight", "0.input")}
        assert kinds(student, images, first) == {}


@pytest.mark.parametrize(
    ("part", "factor", "expected"),
    [
        ("weight", 1e3, {"zeros", "dead", "scale"}),
        ("input", 1e3, {"zeros", "dead", "scale"}),
        ("weight", 1e-6, {"clipped", "dead", "scale"}),
        ("input", 1e-6, {"clipped", "dead", "scale"}),
        ("input", 3.0, {"dead"}),
    ],
)
def test_planted_collapses_are_symptoms(
    part: str, factor: float, expected: set[str], make_student: Make, images: Tensor
) -> None:
    student = make_student()
    place = f"0.{part}"
    first = {place: examine(student, images).metrics[f"scale/{place}"]}
    set_scale(student[0], part, factor)
    assert kinds(student, images, first) == {place: expected}


@pytest.mark.parametrize(("bits", "sick"), [(2, True), (1, False)])
def test_error_above_the_signal_is_a_symptom(bits: int, sick: bool) -> None:
    """Of levels that lack zero; a bare sign, followed by batch norm, is meant so."""
    found = Examination({"error/conv1.weight": 1.3}, {"conv1.weight": bits}, {})
    assert [symptom.kind for symptom in symptoms(found, {}, images=1, classes=0)] == (["error"] if sick else [])


def test_all_zero_values_are_no_symptom(make_student: Make, images: Tensor) -> None:
    assert "zeros" not in kinds(make_student(), torch.zeros_like(images)).get("0.input", set())


@pytest.mark.parametrize(("share", "sick"), [(10.0, True), (15.0, True), (16.0, False), (60.0, False)])
def test_agreement_at_chance_is_a_symptom(share: float, sick: bool) -> None:
    """Of ten classes and 128 images: up to 10 + 2 * sqrt(0.09 / 128) = 15.3 %."""
    found = Examination({"agreement": share}, {}, {})
    assert bool(symptoms(found, {}, images=128, classes=10)) is sick


def test_many_oscillating_weights_are_a_symptom_with_dampening_as_remedy() -> None:
    found = Examination({"oscillating/conv1.weight": 0.3}, {"conv1.weight": 4}, {})
    (symptom,) = symptoms(found, {}, images=1, classes=0)
    assert symptom.kind == "oscillating" and symptom.remedy.startswith("dampen it")


# ---- the callback


def health(folder: Path, every: int = 1) -> tuple[Health, MetricLog]:
    metric_log = MetricLog(loggers=[JsonlLogger(folder=folder)], every_n_steps=1)
    return Health(metric_log=metric_log, every_n_steps=every), metric_log


def test_health_metrics_are_rows_of_metrics_jsonl(make_student: Make, fit_three_steps: Fit, tmp_path: Path) -> None:
    fit_three_steps(make_student(), health(tmp_path, every=2))
    rows = read_metrics(tmp_path / "metrics.jsonl")[0]
    assert [row["step"] for row in rows if "scale/0.weight" in row] == [2]
    (row,) = (row for row in rows if "scale/0.weight" in row)
    assert row["gradient/0.weight"] > 0 and row["gradient/0.input"] > 0


def test_collapse_is_logged_once_with_layer_metric_and_remedy(
    make_student: Make, fit_three_steps: Fit, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    student = make_student()
    set_scale(student[5], "weight", 1e3)
    with caplog.at_level(logging.WARNING, logger="qtrain"):
        fit_three_steps(student, health(tmp_path), lr=1e-6)
    said = [
        record.getMessage() for record in caplog.records if record.name.startswith("qtrain.training.callbacks.health")
    ]
    (zeros,) = (line for line in said if "all values round to zero" in line)
    assert zeros.startswith("step 1: 5.weight: ") and "lower fit.scale_lr" in zeros
    assert "quantize.policies.more.layers=[5] quantize.policies.more.weight_bits=8" in zeros
    assert all(line.startswith("step 1: 5.weight: ") and "\n" not in line for line in said)


def test_health_examination_does_not_change_training(make_student: Make, fit_three_steps: Fit, tmp_path: Path) -> None:
    ends = []
    for look in (False, True):
        student = make_student()
        fit_three_steps(student, health(tmp_path) if look else [])
        ends.append(student.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_resumed_run_restores_the_last_health_examination(
    make_student: Make, fit_three_steps: Fit, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What the resume point holds gives the same flips, and no warning twice."""
    student = make_student()
    set_scale(student[5], "weight", 1e3)
    points = ResumePoints(folder=tmp_path / "checkpoints")
    first, metric_log = health(tmp_path)
    fit_three_steps(student, [first, metric_log, points], lr=1e-6)
    saved = torch.load(next(points.folder.iterdir()), weights_only=True)["callbacks"]
    (state,) = (value for key, value in saved.items() if key.startswith("Health"))
    again, _ = health(tmp_path)
    again.load_state_dict(state)
    ours, theirs = again.state_dict(), first.state_dict()
    for place, codes in theirs.pop("codes").items():
        assert torch.equal(ours["codes"][place], codes)
    assert {key: ours[key] for key in theirs} == theirs and ("zeros", "5.weight") in theirs["said"]


def test_wrong_interval() -> None:
    with pytest.raises(ValueError, match=r"Health: every_n_steps must be at least 1, got 0"):
        Health(metric_log=MetricLog(loggers=[]), every_n_steps=0)
