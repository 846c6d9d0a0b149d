"""Gradients of several batches that are added up: the step of the whole batch, with weights quantized once."""

from __future__ import annotations

import copy
from collections import Counter
from functools import partial
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import qtrain
from qtrain.distillation.hard import Hard
from qtrain.distillation.objective import Objective
from qtrain.nn import QuantLinear, QuantWeighted
from qtrain.quantizers.base import Quantizer
from qtrain.quantizers.hooks import share_penalties_
from qtrain.quantizers.uniform.pact import PACT
from qtrain.schedules.constant import Constant
from qtrain.spec import Batch, QuantSpec
from qtrain.training.module import QATModule
from tests.helpers.graphs import counts_graphs
from tests.helpers.widths import WEIGHTS, WRAPPERS

NEAR = 1e-4
"""What quantizers compute in 32 bits agrees so far, in another order of sums."""


def images(size: int = 24) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return Batch(
        torch.randn(size, 1, 4, 4, generator=generator),
        torch.randint(0, 3, (size,), generator=generator),
        torch.arange(size),
    )


def split(size: int) -> list[Batch]:
    whole = images()
    return [
        Batch(*(part[start : start + size] for part in whole))  # type: ignore[arg-type]
        for start in range(0, len(whole.image), size)
    ]


def student(weight: str = "lsq", input: str = "pact") -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.Flatten(), nn.Linear(64, 3)
    )
    bits: Any = {"weight_bits": WEIGHTS.get(weight, 4), "input_bits": 4, "ends": None}
    made = qtrain.quantize(network, images().image, weight=weight, input=input, **bits)
    for module in made.modules():
        for name, strong in (("decay", 0.1), ("strength", 0.01), ("rates", (0.1, None))):  # penalties, to be seen
            if hasattr(module, name):
                setattr(module, name, strong)
    return made.train()


def fit(made: nn.Module, batches: list[Batch], *, accumulated: int, compile: bool = False, **options: Any) -> QATModule:
    module = QATModule(
        student=made,
        objective=Objective(terms={"hard": Hard()}),
        teacher=None,
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        lr_schedule=Constant(value=1.0),
        num_classes=3,
        seed=0,
        compile=compile,
    )
    settings: dict[str, Any] = {"max_epochs": 1, "precision": "64-true", **options}
    trainer = pl.Trainer(accelerator="cpu", devices=1, barebones=True, accumulate_grad_batches=accumulated, **settings)
    trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return module


def distance(one: nn.Module, other: nn.Module) -> float:
    """The largest difference of two states' floats, relative to the tensor's largest value."""
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return max(
        float((a - b).abs().max() / b.abs().max().clamp(min=1e-6))
        for a, b in pairs
        if isinstance(a, Tensor) and a.is_floating_point() and a.numel()
    )


@pytest.mark.parametrize("weight", [*WEIGHTS, *WRAPPERS])
def test_accumulated_batches_make_the_step_of_the_whole_batch(weight: str) -> None:
    """Also what quantizers add of their own: penalties of weights and inputs, averages over steps, random draws."""
    made = student(weight)
    small, large = (fit(copy.deepcopy(made), split(size), accumulated=12 // size) for size in (3, 12))
    assert small.global_step == large.global_step == 2
    assert distance(small.student, large.student) < NEAR
    assert distance(small.student, made) > 100 * NEAR


def test_weights_are_quantized_once_a_step_and_in_evaluation_as_ever() -> None:
    """Seven batches of an epoch are steps of 3, 3 and 1 batches."""
    made, calls = student(), Counter[str]()
    for name, layer in made.named_modules():
        if isinstance(layer, QuantWeighted):
            assert isinstance(layer.weight_quantizer, Quantizer)
            layer.weight_quantizer.register_forward_hook(lambda *_, name=name: calls.update([name]))
    module = fit(made, split(3)[:7], accumulated=3)
    assert module.global_step == 3
    assert calls == {"0": 3, "2": 3, "4": 3}
    made.eval()(images().image.double())
    assert calls == {"0": 4, "2": 4, "4": 4}
    assert all(layer.held_weight is None for layer in made.modules() if isinstance(layer, QuantWeighted))


def test_weights_that_do_not_learn_are_held_too() -> None:
    made = student()
    for parameter in made[2].parameters():  # type: ignore[index]
        parameter.requires_grad_(False)
    small, large = (fit(copy.deepcopy(made), split(size), accumulated=12 // size) for size in (3, 12))
    assert distance(small.student, large.student) < NEAR


def test_a_disabled_quantizer_leaves_the_weight_as_it_is() -> None:
    made = student()
    made[2].weight_quantizer.enabled = False  # type: ignore[index,union-attr]
    small, large = (fit(copy.deepcopy(made), split(size), accumulated=12 // size) for size in (3, 12))
    assert distance(small.student, large.student) < NEAR


def test_accumulated_steps_compile_to_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the first batch of a step, and the last; penalties count once a step there too."""
    backend = counts_graphs(monkeypatch)
    made = student("bnn_plus")
    eager = fit(copy.deepcopy(made), split(3)[:6], accumulated=3, precision="32-true")
    compiled = fit(made, split(3)[:6], accumulated=3, precision="32-true", compile=True)
    assert backend.graphs == 1
    assert distance(compiled.student, eager.student) < 10 * NEAR


def test_a_penalty_counts_once_among_the_layers_that_have_it_together() -> None:
    """For a target, layers that read one tensor have one quantizer, which each of them calls."""
    spec = QuantSpec(bits=4, signed=False)
    pact, own = PACT(spec=spec), PACT(spec=spec)
    layers = nn.ModuleList(QuantLinear(source=nn.Linear(8, 4)) for _ in range(3))
    for layer, quantizer in zip(layers, (pact, pact, own), strict=True):
        layer.input_quantizer = quantizer
    share_penalties_(layers, 0.5)
    assert (pact.penalty_share, own.penalty_share) == (0.25, 0.5)
    x = torch.zeros(2, 8)
    share_penalties_(layers.train(), 1.0)
    sum(layer(x).sum() * 0 for layer in layers).backward()  # type: ignore[union-attr]
    for quantizer in (pact, own):
        assert float(quantizer.level.grad) == pytest.approx(quantizer.decay * float(quantizer.level))  # type: ignore[arg-type]
