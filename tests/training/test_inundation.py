"""AIT's inundation: the factor against a search by trial, the integers that move, and what would take it back."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from qtrain.nn import QuantConv, QuantConvTranspose, QuantLinear
from qtrain.observers.min_max import MinMax
from qtrain.quantizers.base import Quantizer
from qtrain.quantizers.codebook.power_of_two import PowerOfTwo
from qtrain.quantizers.uniform.affine import Affine
from qtrain.quantizers.uniform.lsq import LSQ
from qtrain.quantizers.wrappers.oscillation import Oscillation
from qtrain.schedules.linear import Linear
from qtrain.spec import Granularity, PerChannel, PerTensor, QuantSpec
from qtrain.tracking.loggers import JsonlLogger
from qtrain.tracking.metric_log import MetricLog
from qtrain.training.callbacks.inundation import GradientInundation, IntegerGrid, inundation, needed_factors
from qtrain.utils.json_lines import read_metrics
from tests.helpers.no_wait import NoWait

Make = Callable[..., nn.Sequential]
Fit = Callable[..., Any]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lsq(spec: QuantSpec, granularity: Granularity) -> Quantizer:
    return LSQ(spec=spec, granularity=granularity, init="range")


def with_zero_point(spec: QuantSpec, granularity: Granularity) -> Quantizer:
    return Affine(spec=spec, granularity=granularity, symmetric=False)


def within_oscillation(spec: QuantSpec, granularity: Granularity) -> Quantizer:
    return Oscillation(spec=spec, quantizer=lambda spec: LSQ(spec=spec, granularity=granularity, init="range"))


def quantized(layer: Any, make: Callable[[QuantSpec, Granularity], Quantizer] = lsq, bits: int = 4) -> Any:
    """``layer`` with a calibrated weight quantizer with a scale for each channel, and a gradient."""
    weight = layer.effective_weight().detach()
    layer.weight_quantizer = make(QuantSpec(bits=bits, shape=tuple(weight.shape)), PerChannel())
    observer = MinMax(granularity=PerChannel())
    observer.update(weight)
    layer.weight_quantizer.calibrate_(observer.observed(bits))
    layer.weight.grad = 1e-3 * noise(*layer.weight.shape, seed=1) ** 3  # some large, many small
    return layer


def codes(layer: Any) -> Tensor:
    """As they would be stored."""
    return layer.weight_quantizer.quantize(layer.effective_weight()).codes.clone()


def started(callback: GradientInundation, student: nn.Module, lr: float = 0.01, total: int = 10) -> torch.optim.SGD:
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.grad is not None], lr=lr)
    trainer: Any = SimpleNamespace(estimated_stepping_batches=total, gradient_clip_val=None, optimizers=[optimizer])
    callback.on_train_start(trainer, student)  # type: ignore[arg-type]
    return optimizer


def before_step(callback: GradientInundation, step: int = 0) -> None:
    callback.on_before_optimizer_step(SimpleNamespace(global_step=step), None, None)  # type: ignore[arg-type]


def callback_of(**options: Any) -> GradientInundation:
    return GradientInundation(metric_log=MetricLog(loggers=[]), **options)


def test_inundation_factor_matches_a_search() -> None:
    """Each weight alone, in float64: the code is another one just above the factor and the same just below it."""
    weight, gradient = noise(40) * 2, noise(40, seed=1)
    gradient[3], weight[5], weight[6] = 0.0, 9.0, -9.0
    grid = IntegerGrid(torch.tensor(0.5), torch.tensor(-8.0), torch.tensor(7.0))
    needed = needed_factors(weight, gradient, grid, lr=0.1)

    def code(w: float) -> int:
        return round(min(max(w / 0.5, -8), 7))

    for w, g, f in zip(weight.tolist(), gradient.tolist(), needed.tolist(), strict=True):
        far = [code(w - 0.1 * g * factor) for factor in (1e3, 1e6, 1e9)]
        if math.isinf(f):
            assert far == [code(w)] * 3
        else:
            assert code(w - 0.1 * g * f) != code(w), (w, g, f)
            margin = 0.002 * 0.5 / (0.1 * abs(g))  # what is added for float32, twice, in units of the factor
            assert f - margin < 0 or code(w - 0.1 * g * (f - margin)) == code(w), (w, g, f)
    assert needed[3].isinf() and needed.isinf().sum() < 10


def test_inundation_factor_for_various_counts_and_limits() -> None:
    needed = torch.tensor([[8.0, 2.0], [torch.inf, 4.0]])
    assert [inundation(needed, count).item() for count in (1, 2, 3, 4)] == [2.0, 4.0, 8.0, 8.0]
    assert inundation(needed / 4, 1).item() == 1.0, "gradients never shrink"
    assert inundation(torch.full((3,), torch.inf), 2).item() == 1.0, "nothing can move"


@pytest.mark.parametrize("make", [lsq, with_zero_point, within_oscillation])
@pytest.mark.parametrize("bits", [3, 8, 16])
@pytest.mark.parametrize("share", [0.001, 0.05, 0.3])
def test_at_least_the_share_of_integers_changes(make: Any, bits: int, share: float) -> None:
    """Stored codes before and after a step of plain gradient descent; with half the factor fewer would move."""
    torch.manual_seed(0)
    layer = quantized(QuantConv(source=nn.Conv2d(8, 16, 3)), make, bits)
    plain, start, before = layer.weight.grad.clone(), layer.weight.detach().clone(), codes(layer)
    callback = callback_of(share=share)
    lr = 1e-6  # so small that nothing moves by itself
    optimizer = started(callback, nn.Sequential(layer), lr)
    before_step(callback)
    optimizer.step()
    wanted = math.ceil(share * before.numel())
    assert (codes(layer) != before).sum() >= wanted
    factor = (layer.weight.grad / plain).nanmean()
    torch.testing.assert_close(layer.weight.grad, plain * factor, msg="the layer has one factor")
    assert factor > 1
    if bits < 16:  # whose steps are as small as float32 errs
        with torch.no_grad():
            layer.weight.copy_(start - lr * 0.5 * factor * plain)
        assert (codes(layer) != before).sum() < wanted


@pytest.mark.parametrize("groups", [1, 2])
def test_integers_of_transposed_convolutions_change(groups: int) -> None:
    """Their weight lies in another layout than its scales, one for each output channel."""
    torch.manual_seed(0)
    layer = quantized(QuantConvTranspose(source=nn.ConvTranspose2d(4, 6, 3, groups=groups)))
    before, callback = codes(layer), callback_of(share=0.2)
    optimizer = started(callback, nn.Sequential(layer), lr=1e-4)
    before_step(callback)
    optimizer.step()
    assert (codes(layer) != before).float().mean() >= 0.2


def test_gradient_is_kept_where_enough_integers_change_without_a_factor() -> None:
    torch.manual_seed(0)
    layer = quantized(QuantLinear(source=nn.Linear(32, 16)))
    plain, callback = layer.weight.grad.clone(), callback_of(share=0.01)
    started(callback, nn.Sequential(layer), lr=1e4)
    before_step(callback)
    assert torch.equal(layer.weight.grad, plain)


def test_inundation_share_follows_its_schedule() -> None:
    """Falling to zero: the factor falls with progress, and at the end there is none."""
    torch.manual_seed(0)
    layer = quantized(QuantLinear(source=nn.Linear(32, 16)))
    plain, callback = layer.weight.grad.clone(), callback_of(share=Linear(start=0.5, end=0.0))
    started(callback, nn.Sequential(layer), lr=1e-4)
    factors = []
    for step in (0, 5, 10):
        layer.weight.grad.copy_(plain)
        before_step(callback, step)
        factors.append((layer.weight.grad.norm() / plain.norm()).item())
    assert factors[0] > factors[1] > factors[2] == 1.0


def test_inundation_step_does_not_read_from_the_device() -> None:
    torch.manual_seed(0)
    layer = quantized(QuantLinear(source=nn.Linear(32, 16)))
    callback = callback_of(share=0.1, every_n_steps=1)
    started(callback, nn.Sequential(layer))
    with NoWait():
        before_step(callback)


class Codes(pl.Callback):
    """Codes of the layers with a weight quantizer, before training and after each step."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def look(self, pl_module: Any) -> None:
        layers = [module for module in pl_module.student if getattr(module, "weight_quantizer", None) is not None]
        self.seen.append(torch.cat([codes(layer).flatten() for layer in layers]))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.look(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.look(pl_module)


def test_inundation_metrics_are_logged_in_a_fit(make_student: Make, fit_three_steps: Fit, tmp_path: Path) -> None:
    metric_log = MetricLog(loggers=[JsonlLogger(folder=tmp_path)], every_n_steps=1)
    witness = Codes()
    fit_three_steps(
        make_student(),
        [GradientInundation(metric_log=metric_log, share=0.3, every_n_steps=2), witness, metric_log],
        lr=1e-5,
    )
    (row,) = [row for row in read_metrics(tmp_path / "metrics.jsonl")[0] if "inundation/moved" in row]
    assert row["step"] == 2 and row["inundation/factor"] > 1
    assert row["inundation/moved"] == pytest.approx(
        100 * (witness.seen[2] != witness.seen[1]).double().mean().item(), abs=1e-4
    )
    assert (witness.seen[1] != witness.seen[0]).float().mean() > 0.25, "without it nothing moves at this rate"
    alone = Codes()
    fit_three_steps(make_student(), [alone], lr=1e-5)
    assert torch.equal(alone.seen[0], alone.seen[-1])


def test_layers_that_are_left_out_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    even, uneven = (quantized(QuantLinear(source=nn.Linear(8, 8))) for _ in range(2))
    uneven.weight_quantizer = PowerOfTwo(spec=QuantSpec(bits=4, shape=(8, 8)), granularity=PerTensor())
    callback, plain = callback_of(share=0.5), uneven.weight.grad.clone()
    with caplog.at_level("INFO"):
        started(callback, nn.Sequential(even, uneven), lr=1e-4)
    assert "leaves out 1: codes of PowerOfTwo are not evenly spaced" in caplog.text
    before_step(callback)
    assert torch.equal(uneven.weight.grad, plain)
    even.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="no weight that learns has evenly spaced codes"):
        started(callback, nn.Sequential(even, uneven))


def test_inundation_refuses_other_optimizers_and_clipping(make_student: Make, fit_three_steps: Fit) -> None:
    with pytest.raises(ValueError, match=r"gradients are clipped .*fit.clip_norm=null"):
        fit_three_steps(make_student(), [callback_of()], gradient_clip_val=1.0)
    student = make_student()
    trainer: Any = SimpleNamespace(
        estimated_stepping_batches=1, gradient_clip_val=None, optimizers=[torch.optim.Adam(student.parameters())]
    )
    with pytest.raises(ValueError, match=r"Adam divides by the gradient's size.*optimizer=sgd"):
        callback_of().on_train_start(trainer, student)  # type: ignore[arg-type]


def test_wrong_options() -> None:
    with pytest.raises(ValueError, match=r"GradientInundation: share must be in \[0, 1\], got 2"):
        callback_of(share=2)
    with pytest.raises(ValueError, match="every_n_steps must be at least 1, got 0"):
        callback_of(every_n_steps=0)
    layer, callback = quantized(QuantLinear(source=nn.Linear(4, 4))), callback_of(share=Linear(start=0.0, end=2.0))
    started(callback, nn.Sequential(layer))
    before_step(callback, 5)
    with pytest.raises(ValueError, match=r"share must be in \[0, 1\], got 1\.2"):
        before_step(callback, 6)
