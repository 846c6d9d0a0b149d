"""The LightningModule: groups, rates, what is saved, randomness by step, and evaluation outside of a fit."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from qtrain.allocate.uniform import Uniform
from qtrain.convert.calibrate import calibrate
from qtrain.convert.layers import find_layers
from qtrain.convert.plan import LayerPlan, plan_layers
from qtrain.convert.swap import swap_layers
from qtrain.distillation.hard import Hard
from qtrain.distillation.hint import Hint
from qtrain.distillation.objective import Objective
from qtrain.distillation.soft import Soft
from qtrain.functional.random import seed_of
from qtrain.models.factory import create_model
from qtrain.models.taps import feature_shapes
from qtrain.models.teacher import FrozenTeacher
from qtrain.observers.min_max import MinMax
from qtrain.quantizers.uniform.lsq import LSQ
from qtrain.quantizers.uniform.stochastic_rounding import StochasticRounding
from qtrain.schedules.constant import Constant
from qtrain.schedules.linear import Linear
from qtrain.spec import Batch, PerTensor, Position, QuantSpec
from qtrain.training.evaluation import evaluate
from qtrain.training.module import QATModule, _carry_on_
from qtrain.training.optim import parameter_groups
from tests.helpers.graphs import counts_graphs


def batches(count: int = 4, size: int = 8) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    return [
        Batch(
            torch.randn(size, 1, 8, 8, generator=generator),
            torch.randint(0, 10, (size,), generator=generator),
            torch.arange(size) + i * size,
        )
        for i in range(count)
    ]


def network(width: float, seed: int, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    return create_model(name="cifar_resnet8", num_classes=10, in_channels=1, width=width, **options)


def student() -> nn.Module:
    model = network(0.25, 0, drop_rate=0.2)
    found = find_layers(model, torch.zeros(1, 1, 8, 8))
    recipe = LayerPlan(weight=LSQ, input=LSQ, weight_observer=MinMax, input_observer=MinMax)
    plans = plan_layers(found, Uniform(weight=4, input=4)(found.weighted), recipe)
    swap_layers(model, found, plans)
    calibrate(model, [batches()[0].image], plans)
    return model


def module(*, lr: float = 0.05, teacher: bool = True, **compilation: bool) -> QATModule:
    model, guide = student(), network(0.5, 1)
    terms = {"hard": Hard(weight=0.5), "soft": Soft(weight=0.5) if teacher else None}
    hint = Hint(student_layers=["layer2"], teacher_layers=["layer2"]) if teacher else None
    objective = Objective(terms={**terms, "hint": hint})
    torch.manual_seed(2)
    objective.bind_(
        feature_shapes(model, objective.student_taps, (1, 1, 8, 8)),
        feature_shapes(guide, objective.teacher_taps, (1, 1, 8, 8)),
    )
    return QATModule(
        student=model,
        objective=objective,
        teacher=FrozenTeacher(guide, names=objective.teacher_taps) if teacher else None,
        optimizer=partial(torch.optim.SGD, lr=lr, momentum=0.9, weight_decay=1e-4),
        lr_schedule=Linear(start=1.0, end=0.0),
        num_classes=10,
        seed=3,
        scale_lr=0.001,
        **compilation,
    )


def trainer(folder: Path, **options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(
        accelerator="cpu", default_root_dir=folder, enable_checkpointing=False, **{"max_epochs": 1, **quiet, **options}
    )


def loader(items: list[Batch]) -> DataLoader[Batch]:
    return DataLoader(items, batch_size=None)  # type: ignore[arg-type]


class Losses(pl.Callback):
    """The total loss of each step."""

    def __init__(self) -> None:
        self.totals: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.totals.append(outputs["loss"].item())


def test_a_fit_moves_student_scales_and_regressor_and_leaves_the_teacher(tmp_path: Path) -> None:
    made = module()
    teacher = made._teacher
    assert teacher is not None
    frozen = {name: tensor.clone() for name, tensor in teacher.model.state_dict().items()}
    before = {name: tensor.detach().clone() for name, tensor in made.named_parameters()}
    run = trainer(tmp_path)
    run.fit(made, loader(batches()))
    still = [name for name, tensor in made.named_parameters() if torch.equal(tensor, before[name])]
    assert still == []
    assert any(name.endswith("weight_quantizer.scale") for name in before)
    assert any(name.startswith("objective.") for name in before)
    for name, tensor in teacher.model.state_dict().items():
        assert torch.equal(tensor, frozen[name])


def test_the_teacher_is_neither_saved_nor_optimized(tmp_path: Path) -> None:
    made = module()
    run = trainer(tmp_path)
    run.fit(made, loader(batches(1)))
    assert made._teacher is not None
    teachers = {id(tensor) for tensor in [*made._teacher.model.parameters(), *made._teacher.model.buffers()]}
    assert not teachers & {id(tensor) for tensor in [*made.parameters(), *made.buffers()]}
    optimized = [p for group in run.optimizers[0].param_groups for p in group["params"]]
    assert not teachers & {id(p) for p in optimized}
    run.save_checkpoint(tmp_path / "point.ckpt")
    saved = torch.load(tmp_path / "point.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == made.state_dict().keys()
    assert all(key.startswith(("student.", "objective.")) for key in saved["state_dict"])


def test_every_parameter_is_optimized_exactly_once() -> None:
    made = module()
    groups = parameter_groups([made.student, made.objective], scale_lr=0.001)
    listed = [p for group in groups for p in group["params"]]
    assert len(listed) == len({id(p) for p in listed})
    assert {id(p) for p in listed} == {id(p) for p in made.parameters()}


def test_scales_have_their_own_rate_and_no_decay() -> None:
    made = module()
    names = {id(parameter): name for name, parameter in made.named_parameters()}
    groups = {group["name"]: group for group in parameter_groups([made.student, made.objective], scale_lr=0.001)}
    assert set(groups) == {"weights", "no_decay", "scales"}
    assert all(names[id(p)].endswith("_quantizer.scale") for p in groups["scales"]["params"])
    assert groups["scales"]["lr"] == 0.001
    assert groups["scales"]["weight_decay"] == 0.0
    assert groups["no_decay"]["weight_decay"] == 0.0
    assert all(p.ndim <= 1 for p in groups["no_decay"]["params"])
    assert all(p.ndim >= 2 for p in groups["weights"]["params"])
    decayed = {group["name"]: group for group in parameter_groups([made.student], norm_decay=True)}
    assert set(decayed) == {"weights", "scales"}
    assert "lr" not in decayed["scales"]


def test_the_rate_follows_its_schedule_over_all_steps(tmp_path: Path) -> None:
    rates: list[list[float]] = []

    class Spy(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
            rates.append([group["lr"] for group in optimizer.param_groups])

    trainer(tmp_path, max_epochs=2, callbacks=[Spy()]).fit(module(lr=0.1), loader(batches(4)))
    assert [rate[0] for rate in rates] == pytest.approx([0.1 * (1 - i / 8) for i in range(8)])
    assert [rate[-1] for rate in rates] == pytest.approx([0.001 * (1 - i / 8) for i in range(8)])


def test_carried_optimizer_keeps_its_moments_and_has_the_rates_of_its_own_stage() -> None:
    layer = nn.Linear(2, 1)
    before = torch.optim.SGD(layer.parameters(), lr=0.5, momentum=0.9, weight_decay=0.1)
    torch.optim.lr_scheduler.LambdaLR(before, lambda step: 1.0)
    layer(torch.ones(1, 2)).sum().backward()
    before.step()
    after = torch.optim.SGD(layer.parameters(), lr=0.01, momentum=0.8)
    _carry_on_(after, before.state_dict())
    (group,) = after.param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.01, 0.8, 0)
    assert torch.optim.lr_scheduler.LambdaLR(after, lambda step: 0.5).get_last_lr() == [0.005]
    for parameter in layer.parameters():
        assert torch.equal(after.state[parameter]["momentum_buffer"], before.state[parameter]["momentum_buffer"])


def weights_after_a_fit(folder: Path, items: list[Batch], *, disturb: int) -> dict[str, Tensor]:
    made = module()
    torch.manual_seed(disturb)
    trainer(folder).fit(made, loader(items))
    return {name: tensor.clone() for name, tensor in made.state_dict().items()}


def test_dropout_is_a_function_of_seed_and_step(tmp_path: Path) -> None:
    """The state of the global generator at the start, which no checkpoint holds, does not matter."""
    one = weights_after_a_fit(tmp_path, batches(), disturb=1)
    two = weights_after_a_fit(tmp_path, batches(), disturb=2)
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


def test_ranks_draw_masks_of_their_own() -> None:
    """What the first rank draws is what one process draws."""
    made = module()
    made._total_steps = 4

    def drawn(rank: int, batch_idx: int) -> tuple[float, ...]:
        made.trainer = Mock(global_rank=rank, global_step=2, accumulate_grad_batches=2)
        made.on_train_batch_start(batches(1)[0], batch_idx)
        return tuple(torch.rand(4).tolist())

    assert len({drawn(rank, batch_idx) for rank in (0, 1, 2) for batch_idx in (0, 1)}) == 6
    first = drawn(0, 0)
    torch.manual_seed(seed_of(3, 2))
    assert first == tuple(torch.rand(4).tolist())


class RoundsAtRandom(nn.Module):
    """Values in [-1, 1] rounded at random to 15 levels."""

    def __init__(self) -> None:
        super().__init__()
        self.quantizer = StochasticRounding(spec=QuantSpec(bits=4, signed=True), granularity=PerTensor())
        self.quantizer.scale.fill_(1 / 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.quantizer(x.tanh())


@pytest.mark.parametrize("chance", [nn.Dropout(0.5), RoundsAtRandom()])
def test_second_stage_draws_the_random_numbers_of_the_steps_after_the_first(chance: nn.Module, tmp_path: Path) -> None:
    """At rate 0 and on one image batch, over and over, losses differ by chance alone: dropout, random rounding."""

    def losses(steps: int, start: Position) -> list[float]:
        torch.manual_seed(0)
        made = QATModule(
            student=nn.Sequential(nn.Flatten(), chance, nn.Linear(64, 10)),
            objective=Objective(terms={"hard": Hard()}),
            teacher=None,
            optimizer=partial(torch.optim.SGD, lr=0.0),
            lr_schedule=Constant(value=1.0),
            num_classes=10,
            seed=3,
            start=start,
        )
        seen = Losses()
        trainer(tmp_path, callbacks=[seen]).fit(made, loader(batches(1) * steps))
        return seen.totals

    whole = losses(4, Position())
    assert len(set(whole)) == 4
    assert losses(2, Position(epoch=0, step=2)) == whole[2:]


def test_validation_metrics_are_those_of_evaluate(tmp_path: Path) -> None:
    made, items = module(teacher=False), [*batches(3), *(Batch(*(t[:3] for t in b)) for b in batches(1))]
    run = trainer(tmp_path)
    (metrics,) = run.validate(made, loader(items), verbose=False)
    expected = evaluate(made.student, items, torch.device("cpu"))
    assert metrics["val/top1"] == pytest.approx(expected.top1, abs=1e-4)
    assert metrics["val/loss"] == pytest.approx(expected.loss, abs=1e-5)


def test_evaluate_counts_every_image_and_restores_modes() -> None:
    class Copycat(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            assert not self.training
            return image[:, 0, 0]

    model, (batch,) = Copycat().train(), batches(1)
    image = torch.zeros(8, 1, 8, 10)
    image[torch.arange(8), 0, 0, batch.target] = 5.0
    image[0, 0, 0] = image[0, 0, 0].roll(1)  # one of eight wrong
    items = [Batch(image[:5], batch.target[:5], batch.index[:5]), Batch(image[5:], batch.target[5:], batch.index[5:])]
    metrics = evaluate(model, items, torch.device("cpu"))
    assert metrics.top1 == pytest.approx(87.5)
    assert metrics.right.tolist() == [False] + 7 * [True]
    assert model.training


@pytest.mark.slow
def test_a_compiled_step_trains_as_an_eager_one(tmp_path: Path) -> None:
    """One graph, quantizers, taps and objective included; losses agree to rounding."""
    totals: dict[bool, list[float]] = {}
    for compile in (False, True):
        torch._dynamo.reset()
        seen = Losses()
        made = module(compile=compile)
        for part in made.student.modules():  # inductor draws other numbers
            if isinstance(part, nn.Dropout):
                part.p = 0.0
        made.student.drop_rate = 0.0
        trainer(tmp_path, callbacks=[seen]).fit(made, loader(batches(3)))
        totals[compile] = seen.totals
    assert totals[True] == pytest.approx(totals[False], rel=1e-3)


def test_evaluation_is_compiled_in_one_graph(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A last batch of another size is evaluated without; in all epochs the figures are those of before."""
    backend, metrics = counts_graphs(monkeypatch), []
    for compiled in (False, True):
        made = module(teacher=False, compile_evaluation=compiled)
        run = trainer(tmp_path, max_epochs=2, check_val_every_n_epoch=1)
        last = Batch(*(part[:3] for part in batches(1)[0]))
        run.fit(made, loader(batches(2)), loader([*batches(3), last]))
        metrics.append({name: float(value) for name, value in run.callback_metrics.items() if "val/" in name})
        assert backend.graphs == compiled
    eager, other = metrics
    assert eager == pytest.approx(other, rel=1e-5)
    assert set(eager) == {"val/loss", "val/top1"}


def test_a_fit_that_gave_up_compiling_goes_on_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also where the compiler works again, since a compiled step rounds otherwise."""

    def fails(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("no compiler")

    options = {"compile": True, "or_eager": True, "teacher": False}
    monkeypatch.setattr(torch, "compile", lambda step, **how: fails)
    first, eager = module(**options), module(teacher=False)
    for made, folder in ((first, "first"), (eager, "eager")):
        trainer(tmp_path / folder).fit(made, loader(batches()))
    assert all(torch.equal(tensor, eager.state_dict()[name]) for name, tensor in first.state_dict().items())
    checkpoint: dict[str, Any] = {}
    first.on_save_checkpoint(checkpoint)
    monkeypatch.setattr(torch, "compile", lambda step, **how: step)
    again, resumed = module(**options), module(**options)
    resumed.on_load_checkpoint(checkpoint)
    assert (again.compiles, resumed.compiles) == (True, False)
    again.on_save_checkpoint(checkpoint)
    resumed.on_load_checkpoint(checkpoint)
    assert resumed.compiles
