"""Bits, frozen shares and oscillations while training goes on: when they change, what follows, and exact resumption."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from qtrain.convert.calibrate import calibrate
from qtrain.convert.layers import find_layers, quant_layers
from qtrain.convert.plan import LayerPlan, plan_layers
from qtrain.convert.swap import swap_layers
from qtrain.distill.hard import Hard
from qtrain.distill.objective import Objective
from qtrain.observers.squared_error import SquaredError
from qtrain.quantizers.codebook.kmeans import KMeans
from qtrain.quantizers.codebook.power_of_two import PowerOfTwo
from qtrain.quantizers.uniform.lsq import LSQ
from qtrain.quantizers.wrappers.incremental import Incremental
from qtrain.quantizers.wrappers.oscillation import Oscillation
from qtrain.schedules.constant import Constant
from qtrain.schedules.linear import Linear
from qtrain.schedules.plateaus import Plateaus
from qtrain.spec import Batch, LayerBits, QuantSpec
from qtrain.tracking.loggers import WALL_CLOCK_FIELDS, JsonlLogger
from qtrain.tracking.metric_log import MetricLog
from qtrain.training.callbacks.average import WeightAverage
from qtrain.training.callbacks.bits import BitSchedule, rescale_moments_
from qtrain.training.checkpoint import AtomicCheckpointIO, find_resume_point
from qtrain.training.module import QATModule
from qtrain.training.resume import ResumePoints
from qtrain.utils.json_lines import read_metrics

BATCHES, EPOCHS = 5, 3
STEPS = BATCHES * EPOCHS
DOWN = Plateaus(values=[8, 4, 2], milestones=[5.5 / STEPS, 9.5 / STEPS])  # switches before steps 6 and 10
JOURNAL = MetricLog(loggers=[])


class Loader:
    """The same batches in each epoch; resumable as the data modules' loaders are."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.image = torch.randn(BATCHES, 8, 1, 6, 6, generator=generator)
        self.target = torch.randint(0, 3, (BATCHES, 8), generator=generator)
        self.place, self.resumed = 0, False

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[Batch]:
        self.place = self.place if self.resumed else 0
        self.resumed = False
        while self.place < BATCHES:
            i, self.place = self.place, self.place + 1
            yield Batch(self.image[i], self.target[i], torch.arange(8))

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place, self.resumed = state["place"], True


class Stop(pl.Callback):
    """FirstLastBits the run, as a kill does, when step ``at`` begins."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.at:
            raise ZeroDivisionError


def student(weight: Any = LSQ, bits: int = 2) -> nn.Module:
    """Layers "0" at 8 bits, and "3" and "6" at ``bits``."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    )
    images = Loader().image[0]
    found = find_layers(model, images[:1])
    allocation = {"0": LayerBits(8, 8), "3": LayerBits(bits, bits), "6": LayerBits(bits, bits)}
    recipe = LayerPlan(weight=weight, input=LSQ, weight_observer=SquaredError, input_observer=SquaredError)
    plans = plan_layers(found, allocation, recipe)
    swap_layers(model, found, plans)
    calibrate(model, [images], plans)
    return model


def run(
    folder: Path,
    callbacks: list[pl.Callback],
    *,
    weight: Any = LSQ,
    optimizer: Any = None,
    stop: int = -1,
    average: float | None = None,
) -> QATModule:
    """Fit in ``folder``, from its newest resume point on; with ``stop`` the run dies there."""
    module = QATModule(
        student=student(weight),
        objective=Objective(terms={"hard": Hard(weight=1.0)}),
        teacher=None,
        optimizer=optimizer or partial(torch.optim.Adam, lr=0.02),
        lr_schedule=Linear(start=1.0, end=0.1),
        num_classes=3,
        seed=3,
        scale_lr=1e-4,
    )
    metric_log = MetricLog(loggers=[JsonlLogger(folder=folder)], every_n_steps=1)
    for callback in callbacks:
        if isinstance(callback, BitSchedule):
            callback.metric_log = metric_log
    points = ResumePoints(folder=folder / "points", every_n_steps=1)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        logger=False,
        callbacks=[
            *([] if average is None else [WeightAverage(decay=average, warmup=False)]),
            *callbacks,
            *([Stop(stop)] if stop >= 0 else []),
            metric_log,
            points,
        ],
        plugins=[AtomicCheckpointIO()],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    try:
        trainer.fit(module, Loader(), ckpt_path=find_resume_point(points.folder))
    except ZeroDivisionError:
        assert stop >= 0
    return module


def layers(model: nn.Module) -> dict[str, Any]:
    return dict(quant_layers(model))


def rows(folder: Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in row.items() if name not in WALL_CLOCK_FIELDS}
        for row in read_metrics(folder / "metrics.jsonl")[0]
    ]


def down() -> list[pl.Callback]:
    return [BitSchedule(metric_log=JOURNAL, weight=DOWN, input=DOWN)]


def powers(*, spec: QuantSpec) -> Incremental:
    """INQ, of which nothing is frozen at first, then half before step 6; at most 7 bits, as powers of two have."""
    return Incremental(
        spec=replace(spec, bits=min(spec.bits, 7)),
        quantizer=partial(PowerOfTwo, scale="power_of_two"),
        share=Plateaus(values=[0.0, 0.5, 0.75, 1.0], milestones=[5.5 / STEPS, 9.5 / STEPS, 12.5 / STEPS]),
    )


METHODS: dict[str, tuple[Any, Any]] = {
    "bits": (LSQ, down),
    "incremental": (powers, list),
    "random": (partial(Incremental, quantizer=LSQ, share=Plateaus(values=[0.2, 0.6, 1.0]), by="random"), list),
    "oscillation": (
        partial(Oscillation, quantizer=LSQ, dampening=Linear(start=0.0, end=0.1), threshold=0.02, momentum=0.02),
        down,
    ),
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder and the module of a run of a method that nobody stopped."""
    done: dict[str, tuple[Path, QATModule]] = {}

    def get(name: str) -> tuple[Path, QATModule]:
        if name not in done:
            weight, callbacks = METHODS[name]
            folder = tmp_path_factory.mktemp(name)
            done[name] = folder, run(folder, callbacks(), weight=weight, average=0.5)
        return done[name]

    return get


@pytest.mark.parametrize("stop", [5, 6, 7, 10])
@pytest.mark.parametrize("name", METHODS)
def test_stopped_run_with_bit_schedule_ends_as_an_unstopped_one(
    name: str, stop: int, undisturbed: Any, tmp_path: Path
) -> None:
    """Bits switch, and parts are frozen, before step 6: stopped before the step ahead, at the switch, and behind."""
    weight, callbacks = METHODS[name]
    run(tmp_path, callbacks(), weight=weight, average=0.5, stop=stop)
    resumed = run(tmp_path, callbacks(), weight=weight, average=0.5)
    folder, whole = undisturbed(name)
    for key, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[key]), key
    assert rows(tmp_path) == rows(folder)
    last, first = (
        resumed.trainer.optimizers[0].state_dict()["state"],
        whole.trainer.optimizers[0].state_dict()["state"],
    )
    for index, state in first.items():
        for key, value in state.items():
            assert torch.equal(value, last[index][key]), (index, key)


def test_bits_end_at_the_allocation_and_are_logged(undisturbed: Any) -> None:
    folder, module = undisturbed("bits")
    for name, layer in layers(module.student).items():
        assert int(layer.weight_quantizer.bits) == int(layer.input_quantizer.bits) == (8 if name == "0" else 2)
    switches = [row for row in rows(folder) if any(name.startswith("bits/") for name in row)]
    names = [f"bits/{layer}.{role}" for layer in ("3", "6") for role in ("weight", "input")]
    assert [(row["step"], {name: row[name] for name in row if name.startswith("bits/")}) for row in switches] == [
        (step, dict.fromkeys(names, bits)) for step, bits in ((0, 8.0), (6, 4.0), (10, 2.0))
    ]


def test_incremental_ends_with_every_weight_a_frozen_power_of_two(undisturbed: Any) -> None:
    folder, _ = undisturbed("incremental")
    # The average took the student over at the end; what was trained lies in the last checkpoint.
    trained = student(METHODS["incremental"][0])
    point = find_resume_point(folder / "points")
    assert point is not None
    state = torch.load(point, weights_only=False)["state_dict"]
    trained.load_state_dict({k.removeprefix("student."): v for k, v in state.items() if k.startswith("student.")})
    for layer in layers(trained.eval()).values():
        quantizer: Any = layer.weight_quantizer
        assert quantizer.frozen.all()
        values = quantizer.value.view(torch.float32)
        assert torch.equal(layer.weight, values) and torch.equal(quantizer(layer.weight), values)
        assert torch.equal(values.abs().log2().frac().nan_to_num(neginf=0.0).abs().max(), torch.tensor(0.0))


class Watch(pl.Callback):
    """Notes a quantizer's bits and scale, before and after each step."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, float]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        quantizer = pl_module.student[3].weight_quantizer
        self.seen.append((int(quantizer.bits), float(quantizer.scale)))


def test_a_switch_comes_before_the_step_whose_progress_passes_the_milestone(tmp_path: Path) -> None:
    watch = Watch()
    run(tmp_path, [*down(), watch], weight=partial(LSQ, init="range"))
    assert [bits for bits, _ in watch.seen] == [8] * 6 + [4] * 4 + [2] * 5
    scales = [scale for _, scale in watch.seen]
    assert scales[6] > 4 * scales[5] and scales[10] > 2 * scales[9], "a coarser step after each"


def test_named_layers_have_their_own_schedule_but_not_fewer_bits_than_allocated(tmp_path: Path) -> None:
    named = {"*": {"weight": Constant(value=4)}, "6": {"weight": Constant(value=1), "input": Constant(value=3)}}
    module = run(tmp_path, [BitSchedule(metric_log=JOURNAL, layers=named)])
    bits = {
        name: (int(layer.weight_quantizer.bits), int(layer.input_quantizer.bits))
        for name, layer in layers(module.student).items()
    }
    assert bits == {"0": (8, 8), "3": (4, 2), "6": (2, 3)}


def test_bit_switch_is_logged_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="qtrain.training.callbacks.bits"):
        run(tmp_path, [BitSchedule(metric_log=JOURNAL, weight=DOWN, layers={"6": {"input": Constant(value=4)}})])
    assert [record.getMessage() for record in caplog.records if record.name.startswith("qtrain")] == [
        "step 0: weight 2 -> 8 bits in 2 layers, input 2 -> 4 bits in 1 layer",
        "step 6: weight 8 -> 4 bits in 2 layers",
        "step 10: weight 4 -> 2 bits in 2 layers",
    ]


def test_weight_average_restarts_where_a_range_jumps(tmp_path: Path) -> None:
    """With an average that hardly moves, the student's scales at the end are those of after the last switch."""
    watch = Watch()
    module: Any = run(tmp_path, [*down(), watch], average=0.999)
    after = next(scale for bits, scale in watch.seen if bits == 2)
    assert float(module.student[3].weight_quantizer.scale) == pytest.approx(after, rel=0.02)


class Moments(pl.Callback):
    """Notes a scale and the moments that Adam keeps of it, when each step begins."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, ...]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        scale = pl_module.student[3].weight_quantizer.scale
        state = trainer.optimizers[0].state.get(scale) or {}
        self.seen.append(tuple(float(t) for t in (scale, *(state.get(k, 0.0) for k in ("exp_avg", "exp_avg_sq")))))


def test_bit_switch_rescales_optimizer_moments(tmp_path: Path) -> None:
    before, after = Moments(), Moments()
    run(tmp_path, [before, *down(), after])
    for step in range(1, STEPS):
        (old, *was), (new, *now) = before.seen[step], after.seen[step]
        assert (old != new) == (step in (6, 10)) and all(was)
        assert now == pytest.approx([was[0] * old / new, was[1] * (old / new) ** 2], rel=1e-4)


@pytest.mark.parametrize("make", [partial(torch.optim.Adam, eps=0.0), partial(torch.optim.SGD, momentum=0.9)])
def test_rescaled_moments_equal_those_of_a_run_with_the_new_scale(make: Any) -> None:
    """``p`` that becomes ``4 p``, against one that was 4 p from the start: its gradients are a quarter."""
    gradients = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    small, large = (nn.Parameter(torch.tensor([1.0, 2.0, 3.0]) * f) for f in (1, 4))
    optimizers = [make([small], lr=0.01), make([large], lr=0.01)]
    for i, gradient in enumerate(gradients):
        if i == 3:
            with torch.no_grad():
                small.mul_(4)
            rescale_moments_([optimizers[0]], {small: torch.full((3,), 0.25)})
        small.grad, large.grad = gradient if i < 3 else gradient / 4, gradient / 4
        for optimizer in optimizers:
            optimizer.step()
    moments = [optimizer.state[p] for optimizer, p in zip(optimizers, (small, large), strict=True)]
    assert moments[0].keys() == moments[1].keys() and moments[0]
    for name, value in moments[0].items():
        torch.testing.assert_close(value, moments[1][name])


def test_rescale_moments_ignores_parameters_without_state() -> None:
    parameter = nn.Parameter(torch.ones(2))
    rescale_moments_(
        [torch.optim.Adam([parameter])], {parameter: torch.ones(2), nn.Parameter(torch.ones(1)): torch.ones(1)}
    )


WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "BitSchedule: schedules nothing; give weight, input or layers"),
    ({"weight": DOWN, "images": 0}, "BitSchedule: images must be at least 1, got 0"),
    ({"layers": {"0": {"weights": DOWN}}}, "BitSchedule: layers.0 may give weight and input, got weights"),
]


@pytest.mark.parametrize(("options", "line"), WRONG)
def test_wrong_options(options: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        BitSchedule(metric_log=JOURNAL, **options)


FOUND_AT_THE_START: list[tuple[Any, dict[str, Any], str]] = [
    (LSQ, {"layers": {"layer3.*": {"weight": DOWN}}}, r"BitSchedule: pattern 'layer3\.\*' matches no quantized layer"),
    (LSQ, {"weight": Linear(start=20, end=2)}, "BitSchedule: layer '0': LSQ: bits must be 1..16, got 17"),
    (KMeans, {"weight": DOWN}, "BitSchedule: layer '3': KMeans: its tables were made for 2 bits and cannot become 4"),
    (
        partial(Incremental, quantizer=LSQ, share=0.5),
        {"weight": DOWN},
        "BitSchedule: layer '3': Incremental: .*cannot become 4",
    ),
]


@pytest.mark.parametrize(("weight", "options", "line"), FOUND_AT_THE_START)
def test_impossible_bit_schedules_are_refused_before_the_first_step(
    weight: Any, options: dict[str, Any], line: str, tmp_path: Path
) -> None:
    watch = Watch()
    with pytest.raises(ValueError, match=line):
        run(tmp_path, [BitSchedule(metric_log=JOURNAL, **options), watch], weight=weight)
    assert watch.seen == []
