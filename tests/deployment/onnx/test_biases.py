"""Rounded biases are stored as they are, so that the runtime gives the codes of the student."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import qtrain
from qtrain.deployment.onnx.biases import round_biases_
from qtrain.deployment.onnx.lowering import lower
from qtrain.deployment.parity.verify import verify
from qtrain.utils.eval_mode import evaluating

FAST = {"weight_observer": "min_max", "input_observer": "min_max"}


class Net(nn.Module):
    """A layer with a norm behind it, one with a bias and a norm, one with a bias, and one without."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv, self.norm2 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.up, self.plain = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 8, 1, bias=False)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.stem(x)))
        x = torch.relu(self.norm2(self.conv(x)))
        return self.head(torch.relu(self.plain(torch.relu(self.up(x)))).mean((2, 3)))


def network() -> nn.Module:
    torch.manual_seed(0)
    model = Net().eval()
    for norm in (model.norm1, model.norm2):
        for parameter, low, high in ((norm.weight, 0.5, 2.0), (norm.bias, -1, 1), (norm.running_mean, -1, 1)):
            nn.init.uniform_(parameter, low, high)
    return model


def coded(student: nn.Module) -> dict[str, Tensor]:
    """What each layer adds to its sums, in steps of the file, float64 (O,)."""
    lowering, found = lower(student), {}
    for name, bias in lowering.biases.items():
        value = lowering.model.get_submodule(name).bias.value.double()
        found[name] = value / bias.scale.double()
    return found


def test_what_is_added_becomes_a_whole_number_of_steps() -> None:
    student = qtrain.quantize(network(), torch.randn(8, 3, 8, 8), **FAST)
    before = coded(student)
    assert all(bool((steps - steps.round()).abs().max() > 0.1) for steps in before.values())
    assert round_biases_(student) == ["stem", "conv", "up", "head"]
    for name, steps in coded(student).items():
        assert torch.equal(steps.round(), before[name].round())
        assert float((steps - steps.round()).abs().max()) < 0.01


def test_the_difference_is_at_most_half_a_step_and_nothing_else_changes() -> None:
    student = qtrain.quantize(network(), torch.randn(8, 3, 8, 8), **FAST)
    before = copy.deepcopy(student)
    round_biases_(student)
    changed = {n for n, p in student.named_parameters() if not torch.equal(p, before.get_parameter(n))}
    assert changed == {"norm1.bias", "norm2.bias", "up.bias", "head.bias"}
    assert not student.training
    lowering = lower(before)
    difference = (student.up.bias - before.up.bias).abs()
    assert bool((difference <= 0.5001 * lowering.biases["up"].scale).all())


def test_with_rounded_biases_the_runtime_gives_the_codes_of_the_student() -> None:
    """Without, thousands of codes differ, because 8 bits leave no room for finer biases."""
    pytest.importorskip("onnxruntime")
    images = torch.randn(128, 3, 16, 16)
    differing = {}
    for target in (None, "onnxruntime"):
        student = qtrain.quantize(network(), images[:8], target=target, weight_bits=8, input_bits=8, **FAST)
        verdict = verify(student, [images], (3, 16, 16))
        (tier,) = (tier for tier in verdict.tiers if tier.name == "onnxruntime, unoptimized")
        differing[target] = sum(layer.biased for layer in tier.layers.values())
    assert differing[None] > 100 and differing["onnxruntime"] == 0


def test_a_shared_bias_stays_as_it_is() -> None:
    model = network()
    model.up.bias = nn.Parameter(torch.rand(8))
    model.plain.bias = model.up.bias
    student = qtrain.quantize(model, torch.randn(8, 3, 8, 8), **FAST)
    before = student.up.bias.clone()
    assert round_biases_(student) == ["stem", "conv", "head"]
    assert torch.equal(student.up.bias, before)


def test_an_input_without_a_form_is_named_and_nothing_changes() -> None:
    student = qtrain.quantize(network(), torch.randn(8, 3, 8, 8), input="dynamic", **FAST)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    with pytest.raises(ValueError, match="stem: its input has no form in ONNX"):
        round_biases_(student)
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


def test_distilling_for_a_target_ends_with_rounded_biases() -> None:
    images, labels = torch.randn(16, 3, 8, 8), torch.randint(5, (16,))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=8)
    student = qtrain.quantize(network(), images, target="onnxruntime", **FAST)
    qtrain.distill(student, loader, epochs=1)
    with evaluating(student):
        assert all(float((steps - steps.round()).abs().max()) < 0.01 for steps in coded(student).values())
