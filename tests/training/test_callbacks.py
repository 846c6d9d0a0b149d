"""What happens around the step: averages, statistics, a loss that is no number, signals, progress."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from qtrain.spec import Batch
from qtrain.tracking import metric_log
from qtrain.tracking.metric_log import MetricLog
from qtrain.training.callbacks.average import WeightAverage, ema_decay
from qtrain.training.callbacks.batchnorm import reestimate_batchnorm
from qtrain.training.callbacks.finite import NonFiniteLossError, StopOnNonFinite, first_non_finite
from qtrain.training.callbacks.progress import Progress, progress_line
from qtrain.training.callbacks.signals import StopOnSignal
from qtrain.training.checkpoint import AtomicCheckpointIO, resume_point_name
from qtrain.training.resume import ResumePoints
from qtrain.utils.errors import RunInterruptedError
from qtrain.utils.progress import duration

IMAGE = torch.randn(12, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def student() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))


class Module(pl.LightningModule):
    def __init__(self, model: nn.Module, lr: float = 0.1) -> None:
        super().__init__()
        self.student = model
        self.lr = lr
        self.validated: dict[str, Tensor] = {}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.student(batch.image), batch.target)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.validated = {name: tensor.clone() for name, tensor in self.student.state_dict().items()}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.student.parameters(), lr=self.lr)


def fit(
    module: pl.LightningModule,
    callbacks: Iterable[pl.Callback],
    image: Tensor = IMAGE,
    validate: bool = False,
    **options: Any,
) -> pl.Trainer:
    """One epoch of three batches of four."""
    batches = [Batch(part, torch.arange(4) % 3, torch.arange(4)) for part in image.split(4)]
    loader = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=list(callbacks),
        plugins=[AtomicCheckpointIO()],
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, pl.callbacks.Checkpoint) for callback in callbacks),
        **{"max_epochs": 1, **options},
    )
    trainer.fit(module, loader, loader if validate else None)
    return trainer


# ---- weight average


class Recorder(pl.Callback):
    """The student's state after each step."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.states.append({name: tensor.clone() for name, tensor in pl_module.student.state_dict().items()})  # type: ignore[union-attr]


def test_average_follows_its_formula_and_the_student_keeps_it() -> None:
    module, recorder = Module(student()), Recorder()
    expected = {name: tensor.clone() for name, tensor in module.student.state_dict().items()}
    fit(module, [WeightAverage(decay=0.5, warmup=False), recorder], validate=True)
    assert len(recorder.states) == 3 and not torch.equal(recorder.states[0]["0.weight"], recorder.states[2]["0.weight"])
    for state in recorder.states:
        for name, value in state.items():
            expected[name] = 0.5 * expected[name] + 0.5 * value if value.is_floating_point() else value
    for name, value in module.student.state_dict().items():
        torch.testing.assert_close(value, expected[name], msg=name)
        # Validation, after the last step, saw the average too.
        assert torch.equal(module.validated[name], value), name
    assert module.student.state_dict()["1.num_batches_tracked"] == 3


def test_average_has_32_bits_where_weights_have_16() -> None:
    """Steps of a thousandth of the way are less than bf16 can tell of one."""
    module, average = Module(student().bfloat16()), WeightAverage(decay=0.999, warmup=False)
    trainer = Mock(global_step=0)
    average.on_train_start(trainer, module)
    before = average.average["0.weight"].clone()
    with torch.no_grad():
        module.student[0].weight.add_(0.25)  # type: ignore[index]
    moved = module.student[0].weight.detach().float() - before  # type: ignore[index]
    for step in range(1, 1001):
        trainer.global_step = step
        average.on_train_batch_end(trainer, module, None, None, 0)
    assert average.average["0.weight"].dtype == torch.float32
    torch.testing.assert_close(average.average["0.weight"] - before, (1 - 0.999**1000) * moved, rtol=1e-3, atol=1e-4)
    # Validation, which has to round it, leaves it as it is.
    kept, weight = average.average["0.weight"].clone(), module.student[0].weight.clone()  # type: ignore[index]
    trainer.state.fn = "fit"
    average.on_validation_start(trainer, module)
    assert not torch.equal(module.student[0].weight, weight)  # type: ignore[index]
    average.on_validation_end(trainer, module)
    assert torch.equal(module.student[0].weight, weight)  # type: ignore[index]
    assert torch.equal(average.average["0.weight"], kept)


def test_average_counts_optimizer_steps_and_not_batches() -> None:
    """Of an epoch's three batches the first only adds its gradient: four updates in two epochs."""
    module, recorder = Module(student()), Recorder()
    expected = module.student.state_dict()["0.weight"].clone()
    fit(module, [WeightAverage(decay=0.5, warmup=False), recorder], accumulate_grad_batches=2, max_epochs=2)
    states = [state["0.weight"] for state in recorder.states]
    assert torch.equal(states[2], states[3]) and not torch.equal(states[3], states[4])
    for batch in (1, 2, 4, 5):
        expected = 0.5 * expected + 0.5 * states[batch]
    torch.testing.assert_close(module.student.state_dict()["0.weight"], expected)


def test_restored_average_waits_for_the_next_step() -> None:
    """Of a run that was saved after a step, further batches only add to the next gradient."""
    module, average, restored = Module(student()), WeightAverage(), WeightAverage()
    trainer = fit(module, [average])
    restored.load_state_dict(average.state_dict())
    before = {name: tensor.clone() for name, tensor in restored.average.items()}
    with torch.no_grad():
        module.student[0].weight.add_(1)  # type: ignore[index]
    restored.on_train_batch_end(trainer, module, None, None, 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in restored.average.items())


def test_validation_outside_of_a_fit_sees_the_weights_themselves() -> None:
    module, average = Module(student()), WeightAverage()
    trainer = fit(module, [average])
    with torch.no_grad():
        module.student[0].weight.fill_(7)  # type: ignore[index]
    loader = DataLoader([Batch(IMAGE, torch.arange(12) % 3, torch.arange(12))], batch_size=None)  # type: ignore[arg-type]
    trainer.validate(module, loader, verbose=False)
    assert bool((module.validated["0.weight"] == 7).all())
    assert not bool((average.average["0.weight"] == 7).any())


def test_integers_and_flags_are_copied_exactly() -> None:
    model = student()
    model.register_buffer("bits", torch.tensor(4))
    model.register_buffer("initialized", torch.tensor(True))
    fit(Module(model), [WeightAverage(decay=0.999, warmup=False)])
    assert model.get_buffer("bits") == 4 and model.get_buffer("bits").dtype == torch.int64
    assert model.get_buffer("initialized")


def test_decay_warms_up() -> None:
    assert ema_decay(step=1, decay=0.999, warmup=True) == pytest.approx(2 / 11)
    assert ema_decay(step=10**6, decay=0.999, warmup=True) == 0.999
    assert ema_decay(step=1, decay=0.999, warmup=False) == 0.999


@pytest.mark.parametrize("decay", [0.0, 1.0, -1.0])
def test_decay_out_of_range(decay: float) -> None:
    with pytest.raises(ValueError, match=r"decay must be in \(0, 1\)"):
        WeightAverage(decay=decay)


# ---- batch norm


def test_reestimated_statistics_are_the_means_over_batches() -> None:
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(0.5))
    bn = model[0]
    assert isinstance(bn, nn.BatchNorm2d)
    bn.running_mean = torch.tensor([100.0])
    model.train()
    model[1].eval()
    batches = [IMAGE[:4] * 3 + 1, IMAGE[4:8], IMAGE[8:]]
    assert reestimate_batchnorm(model, iter(batches)) == 3
    means = torch.stack([batch.mean() for batch in batches])
    variances = torch.stack([batch.var(unbiased=True) for batch in batches])
    torch.testing.assert_close(bn.running_mean, means.mean().reshape(1))
    torch.testing.assert_close(bn.running_var, variances.mean().reshape(1))
    assert bn.momentum == 0.1 and bn.training and not model[1].training and bn.num_batches_tracked == 0


def test_a_later_layers_statistics_are_those_of_training_mode_without_dropout() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(0.9), nn.BatchNorm2d(1)).eval()
    reestimate_batchnorm(model, [IMAGE])
    last = model[2]
    assert isinstance(last, nn.BatchNorm2d) and last.running_var is not None
    # The first normalizes its batch; with dropout the variance would be 10.
    torch.testing.assert_close(last.running_var, torch.ones(1) * IMAGE.numel() / (IMAGE.numel() - 1), rtol=1e-3, atol=0)
    assert not last.training


def test_reestimate_without_batches_or_batch_norm_changes_nothing() -> None:
    bn = nn.BatchNorm2d(1)
    assert reestimate_batchnorm(bn, []) == 0 and torch.equal(bn.running_var, torch.ones(1))  # type: ignore[arg-type]
    assert reestimate_batchnorm(nn.Linear(1, 1), [IMAGE]) == 0


# ---- non-finite losses


def poisoned(kind: str) -> tuple[nn.Sequential, Tensor]:
    model, image = student(), IMAGE.clone()
    with torch.no_grad():
        if kind == "parameter":
            model[0].weight[0, 0, 0, 0] = torch.nan  # type: ignore[index]
            model[4].weight[0, 0] = torch.nan  # type: ignore[index]
        elif kind == "buffer":
            model.eval()
            model[1].running_var[1] = torch.inf  # type: ignore[index]
        elif kind == "output":
            model[4].weight[:] = 3e38  # type: ignore[index]
        elif kind == "input":
            image[0] = torch.nan
    return model, image


WHERE = {
    "parameter": "0: parameter weight",
    "buffer": "1: buffer running_var",
    "output": "4: output",
    "input": "input images",
    "": None,
}


@pytest.mark.parametrize("kind", WHERE)
def test_the_first_value_that_is_not_finite_is_found(kind: str) -> None:
    model, image = poisoned(kind)
    assert first_non_finite(model, image) == WHERE[kind]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("kind", ["parameter", "output", "input"])
def test_a_non_finite_loss_stops_the_run_in_one_line(kind: str) -> None:
    model, image = poisoned(kind)
    module = Module(model)
    remedy = "look for the image" if kind == "input" else "lower the learning rate"
    with pytest.raises(NonFiniteLossError, match=f"at step 0 .*: {WHERE[kind]}; {remedy}") as caught:
        fit(module, [StopOnNonFinite()], image=image)
    assert isinstance(caught.value, ValueError) and "\n" not in str(caught.value)


def test_a_run_that_diverges_is_caught_at_its_step() -> None:
    with pytest.raises(NonFiniteLossError, match=r"at step [12] .*: \d: (parameter weight|output);"):
        fit(Module(student(), lr=3e38), [StopOnNonFinite()])


def test_run_with_finite_losses_is_not_stopped() -> None:
    assert fit(Module(student()), [StopOnNonFinite()]).global_step == 3


def test_losses_on_an_accelerator_are_checked_every_n_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnDevice:
        """A loss that claims to lie on a GPU; looking at it counts."""

        device = torch.device("cuda")

        def __init__(self, value: float) -> None:
            self.value = torch.tensor(value)

        def detach(self) -> Tensor:
            return self.value

    class FakeTrainer:
        global_step, current_epoch = 0, 0

    callback, trainer, module = StopOnNonFinite(every_n_steps=4), FakeTrainer(), Module(student())
    looks = 0

    def stop(*_: Any) -> None:
        nonlocal looks
        looks += 1

    monkeypatch.setattr(callback, "_stop", stop)
    for step, value in enumerate([1.0, float("nan"), 1.0]):
        trainer.global_step = step
        callback.on_before_backward(trainer, module, OnDevice(value))  # type: ignore[arg-type]
    assert looks == 0
    trainer.global_step = 3
    callback.on_before_backward(trainer, module, OnDevice(1.0))  # type: ignore[arg-type]
    assert looks == 1
    trainer.global_step = 4
    callback.on_before_backward(trainer, module, OnDevice(float("inf")))  # type: ignore[arg-type]
    callback.on_train_epoch_end(trainer, module)  # type: ignore[arg-type]
    assert looks == 2


# ---- signals


class SendSignal(pl.Callback):
    def on_train_batch_start(self, *args: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def test_the_run_stops_with_a_line_that_says_how_to_resume(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    handlers = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    points = ResumePoints(folder=tmp_path)
    stop = StopOnSignal(resume_points=points, command="python -m qtrain +experiment=x")
    with pytest.raises(RunInterruptedError) as caught, caplog.at_level(logging.WARNING):
        fit(Module(student()), [SendSignal(), stop, points])
    assert stop.interrupted and caught.value.exit_code == 143
    assert caught.value.resume_point == tmp_path / "step-00000001.ckpt" and caught.value.resume_point.exists()
    assert "resume with: python -m qtrain +experiment=x" in caplog.text
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_ranks_that_agreed_stop_at_the_next_batch_that_can_be_saved(tmp_path: Path) -> None:
    """They agree at the fourth batch, behind which gradients are still added up."""
    points = Mock(folder=tmp_path)
    stop = StopOnSignal(resume_points=points, agree_every_n_batches=4)
    stop.note = Mock(signum=signal.SIGTERM)
    trainer = Mock(world_size=2)
    trainer.strategy.root_device = torch.device("cpu")
    trainer.strategy.reduce.side_effect = lambda rank, reduce_op: rank
    trainer.strategy.broadcast.return_value = None
    points.save_within_epoch.side_effect = lambda trainer: (place + 1) % 3 == 0
    for place in range(5):
        stop.on_train_batch_end(trainer, Mock(), None, None, place)
    assert trainer.strategy.reduce.call_count == 1
    place = 5
    with pytest.raises(RunInterruptedError):
        stop.on_train_batch_end(trainer, Mock(), None, None, place)


def test_signal_handlers_are_restored_after_a_run(tmp_path: Path) -> None:
    handlers = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    points = ResumePoints(folder=tmp_path)
    fit(Module(student()), [StopOnSignal(resume_points=points), points])
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_files_of_later_steps_go_when_a_run_saves_that_resumed_before_them(tmp_path: Path) -> None:
    """The files of steps 20 and 30 were damaged, so the run went on from step 10; at step 15 it has its own."""
    for step in (5, 10, 20, 30):
        (tmp_path / resume_point_name(step)).touch()
    trainer = Mock(global_step=15, is_global_zero=True)
    trainer.save_checkpoint.side_effect = lambda path, weights_only: path.touch()
    ResumePoints(folder=tmp_path, keep=2).on_train_epoch_end(trainer, Module(student()))
    assert sorted(path.name for path in tmp_path.iterdir()) == [resume_point_name(10), resume_point_name(15)]


def test_ranks_that_resume_at_different_steps_are_stopped(tmp_path: Path) -> None:
    trainer = Mock(global_step=12, global_rank=1, fit_loop=Mock(restarting=False))
    trainer.strategy.broadcast.return_value = 16  # what rank 0 has
    with pytest.raises(RuntimeError, match="rank 1 resumes at step 12, rank 0 at 16"):
        ResumePoints(folder=tmp_path).on_train_start(trainer, Module(student()))


def test_validation_within_epochs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"val_check_interval is 0\.5"):
        fit(Module(student()), [ResumePoints(folder=tmp_path)], validate=True, val_check_interval=0.5)


# ---- rows of metrics


def test_a_step_has_one_row_with_the_images_of_all_ranks_and_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four ranks with batches of 8 each; some only add their gradient, and are counted in the next row."""
    clock = [10.0]
    monkeypatch.setattr(metric_log.time, "perf_counter", lambda: clock[0])
    written = Mock()
    rows = MetricLog(loggers=[written], every_n_steps=1)
    optimizer = torch.optim.SGD(student().parameters(), lr=0.1)
    trainer = Mock(world_size=4, is_global_zero=True, current_epoch=0, callback_metrics={}, optimizers=[optimizer])
    batch = Batch(torch.zeros(8, 1, 4, 4), torch.zeros(8), torch.arange(8))
    for step, seconds in ((0, 1.0), (0, 1.0), (1, 1.0), (2, 2.0), (2, 1.0)):
        clock[0] += seconds
        trainer.global_step = step
        rows.on_train_batch_end(trainer, Module(student()), None, batch, 0)
    told = [(call.kwargs["step"], call.args[0]["train/images_per_s"]) for call in written.log_metrics.call_args_list]
    assert told == [(0, 32.0), (1, 32.0), (2, 16.0)]


# ---- progress


def test_progress_line_has_epoch_step_loss_speed_and_time_left() -> None:
    line = progress_line(epoch=3, epochs=20, step=120, steps=2000, loss=0.51234, images_per_s=3500.4, left_s=80)
    assert line == "epoch 3/20  step 120/2000  loss 0.5123  3500 images/s  1:20 left"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59.4, "59 s"), (60, "1:00"), (205, "3:25"), (7405, "2:03:25"), (-3, "0 s")]
)
def test_duration_formats_seconds_minutes_and_hours(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_progress_of_a_fit_with_max_steps_shows_its_epochs(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="qtrain"):
        fit(Module(student()), [Progress(bar=False, every_s=1e-9)], max_epochs=-1, max_steps=4)
    assert any(line.startswith("epoch 2/2  step 4/4  loss ") for line in caplog.messages)


def test_progress_of_a_compiled_fit_says_that_it_compiles(caplog: pytest.LogCaptureFixture) -> None:
    """The first batch, in which it does, is no measure of the time left: no line is of it."""
    module = Module(student())
    module.compiles = True  # type: ignore[assignment]
    with caplog.at_level(logging.INFO, logger="qtrain"):
        fit(module, [Progress(title="w4a4", bar=False, every_s=1e-9)])
    told = [line for line in caplog.messages if line.startswith("w4a4: ")]
    assert told[0] == "w4a4: compiling the training step, which takes a while; the time left follows"
    assert [line.split("  ")[1] for line in told if "images/s" in line] == ["step 2/3", "step 3/3"]


def test_speed_and_time_left_are_of_all_ranks_and_without_the_batch_that_compiled(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A second passes at each look: the second of ten steps, 4 x 12 images, took two, so 24 a second and 16 s left."""
    now = iter(range(100))
    monkeypatch.setattr("qtrain.training.callbacks.progress.time.perf_counter", lambda: float(next(now)))
    trainer = Mock(is_global_zero=True, world_size=4, estimated_stepping_batches=10, max_epochs=1, current_epoch=0)
    progress, module = Progress(bar=False, every_s=1e-9), Mock(compiles=True)
    with caplog.at_level(logging.INFO, logger="qtrain"):
        for step in (0, 1, 2):
            trainer.global_step = step
            if step == 0:
                progress.on_train_start(trainer, module)
            else:
                progress.on_train_batch_end(trainer, module, torch.tensor(1.0), (IMAGE,), step)
    assert caplog.messages[-1].endswith(f"24 images/s  {duration(16)} left")


def test_plain_lines_come_at_their_interval(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="qtrain"):
        fit(Module(student()), [Progress(title="w4a4", bar=False, every_s=1e-9)])
        assert sum("images/s" in line for line in caplog.messages) == 3
        assert any(line.startswith("w4a4: epoch 1/1  step 3/3  loss ") for line in caplog.messages)
        caplog.clear()
        fit(Module(student()), [Progress(bar=False, every_s=3600)])
        assert [line for line in caplog.messages if "images/s" in line] == []


def test_progress_bar_appears_and_disappears(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(title="w4a4", bar=True)
    progress.every_s = 1e-9
    fit(Module(student()), [progress])
    assert progress._rich is None
    assert "w4a4" in capsys.readouterr().err


def test_wrong_intervals() -> None:
    with pytest.raises(ValueError, match="every_s must be positive"):
        Progress(every_s=0)
    with pytest.raises(ValueError, match="MetricLog: every_n_steps"):
        MetricLog(loggers=[], every_n_steps=0)
    with pytest.raises(ValueError, match="StopOnNonFinite: every_n_steps"):
        StopOnNonFinite(every_n_steps=0)


def test_a_norm_that_no_batch_reaches_keeps_its_statistics() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.aside = nn.BatchNorm2d(2), nn.BatchNorm2d(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.aside(x) if self.training else x)  # type: ignore[no-any-return]

    model = Auxiliary()
    model(torch.randn(4, 2, 3, 3) * 5 + 1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = torch.randn(8, 2, 3, 3) + 3
    assert reestimate_batchnorm(model, [images]) == 1
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before if name.startswith("aside"))
    torch.testing.assert_close(after["norm.running_mean"], images.mean((0, 2, 3)))


def test_statistics_stay_where_a_forward_fails() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(18, 2))
    model[0](torch.randn(4, 2, 3, 3) * 5 + 1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        reestimate_batchnorm(model, [torch.randn(8, 2, 3, 3), torch.randn(8, 2, 5, 5)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
