"""A step of a quantized student is one graph by any method, and stays it while bits, rates and keys change."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import qtrain
from qtrain.distillation.hard import Hard
from qtrain.distillation.objective import Objective
from qtrain.distillation.soft import Soft
from qtrain.nn import QuantWeighted
from qtrain.quantizers.base import Quantizer
from qtrain.quantizers.hooks import begin_step_
from qtrain.schedules.linear import Linear
from qtrain.training.step import StudentStep
from tests.helpers.graphs import CountingBackend

METHODS: dict[str, dict[str, Any]] = {
    "lsq per channel": {"weight": "lsq", "input": "lsq", "granularity": "channel"},
    "lsq_plus": {"weight": "lsq_plus", "input": "lsq_plus"},
    "pact over dorefa": {"weight": "dorefa", "input": "pact"},
    "quant_noise": {"weight": "quant_noise", "input": "lsq"},
    "dorefa": {"weight": "dorefa", "input": "dorefa"},
    "apot": {"weight": "apot", "input": "apot"},
    "lq_nets": {"weight": "lq_nets", "input": "lq_nets"},
    "duq": {"weight": "duq", "input": "duq"},
    "dynamic": {"weight": "lsq", "input": "dynamic"},
    "mx": {"weight": "mx", "input": "mx"},
    "ocp_mx": {"weight": "ocp_mx", "input": "ocp_mx"},
}
"""Both weights and inputs of each layer by one method, where it takes both."""


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.Flatten(), nn.Linear(64, 3)
    )


def quantizers_of(student: nn.Module) -> list[Quantizer]:
    layers = [module for module in student.modules() if isinstance(module, QuantWeighted)]
    both = [quantizer for layer in layers for quantizer in (layer.weight_quantizer, layer.input_quantizer)]
    return [quantizer for quantizer in both if quantizer is not None]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_one_graph_for_all_bits_rates_and_temperatures(method: str) -> None:
    """And computes what the step computes without a compiler, gradients included."""
    backend = CountingBackend()
    image, target, answer = torch.rand(4, 1, 4, 4), torch.tensor([0, 1, 2, 0]), torch.randn(4, 3)
    student = qtrain.quantize(network(), image, ends=None, **METHODS[method]).train()
    terms = {"hard": Hard(), "soft": Soft(weight=Linear(start=1.0, end=0.5), temperature=Linear(start=4.0, end=2.0))}
    step = StudentStep(student=student, objective=Objective(terms=terms))
    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=False)
    changed = 0
    for number, bits in enumerate((4, 5, 3)):
        for quantizer in quantizers_of(student):
            if quantizer.switchable and bits in quantizer.widths:
                quantizer.set_range_(bits=bits, signed=bool(quantizer.signed))
                changed += number > 0
        begin_step_(student, seed=0, step=number, progress=number / 2)
        step.objective.set_progress_(number / 2)
        eager = copy.deepcopy(step)
        total, expected = compiled(image, target, answer)["total"], eager(image, target, answer)["total"]
        torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-6)
        total.backward()
        expected.backward()
        for (name, one), other in zip(step.named_parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)
        step.zero_grad()
    assert backend.graphs == 1
    assert changed or method in ("lq_nets", "ocp_mx"), "of these two no such bits can change in place"
