"""``qtrain.quantize``: choices by name and by object are those of the config, and what is left out is said."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.data import TensorDataset

import qtrain
from qtrain.nn import QuantConv, QuantLinear
from qtrain.observers.min_max import MinMax
from qtrain.ptq.bias_correction import FromBatches
from qtrain.quantizers.uniform.affine import Affine
from qtrain.quantizers.uniform.lsq_plus import LSQPlus
from qtrain.spec import LayerBits, PerChannel, PerTensor


class Net(nn.Module):
    """A convolution, a bare matrix and a linear layer, with batch norm and without a ``name`` anywhere."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.middle = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.mixing = nn.Parameter(torch.eye(width))
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(torch.relu(self.norm(self.conv(x)))).mean(dim=(2, 3))
        logits: Tensor = self.head(x @ self.mixing)
        return logits


def images() -> Tensor:
    return torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def layer(student: nn.Module, name: str) -> Any:
    found = student.get_submodule(name)
    assert isinstance(found, QuantConv | QuantLinear)
    return found


def test_a_student_is_a_calibrated_copy(model: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    student = qtrain.quantize(model, images(), weight_bits=3, input_bits=5)
    assert type(model.conv) is nn.Conv2d
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not student.training
    middle = layer(student, "middle")
    assert (int(middle.weight_quantizer.bits), int(middle.input_quantizer.bits)) == (3, 5)
    assert bool(middle.weight_quantizer.initialized) and bool(middle.input_quantizer.initialized)


def test_the_report_has_bits_and_what_was_left_out(model: nn.Module) -> None:
    found = qtrain.describe(qtrain.quantize(model, images()))
    assert found.layers == {"conv": LayerBits(8, 8), "middle": LayerBits(4, 4), "head": LayerBits(8, 8)}
    assert found.skipped == {"mixing": "a bare parameter, multiplied by matmul"}
    assert "mixing: full precision: a bare parameter, multiplied by matmul" in str(found)


def test_report_of_an_unquantized_network_is_refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"Net is no student of qtrain.quantize; quantize it first"):
        qtrain.describe(model)


@pytest.mark.parametrize(
    "choices",
    [{"weight": "lsq_plus", "granularity": "tensor"}, {"weight": partial(LSQPlus), "granularity": PerTensor()}],
    ids=["by name", "by object"],
)
def test_names_and_objects_choose_the_same(model: nn.Module, choices: dict[str, Any]) -> None:
    expected = qtrain.quantize(model, images(), options=["quantizer@quantize.weight=lsq_plus"], granularity="tensor")
    student = qtrain.quantize(model, images(), **choices)
    assert isinstance(layer(student, "middle").weight_quantizer, LSQPlus)
    with torch.no_grad():
        assert torch.equal(student(images()), expected(images()))


def test_every_choice_can_be_an_object(model: nn.Module) -> None:
    student = qtrain.quantize(
        model,
        [(images(), torch.zeros(8))],
        bits={"middle": (2, 6)},
        weight=Affine,
        input=partial(Affine, symmetric=False),
        weight_observer=MinMax,
        input_observer=MinMax,
        granularity=PerChannel(0),
        fold="before",
        bias=FromBatches(),
        policies={"six": qtrain.Policy(layers=["middle"], weight_bits=6)},
    )
    assert qtrain.describe(student).layers["middle"] == LayerBits(6, 6)
    assert type(student.head) is nn.Linear, "layers without bits stay in full precision"
    quantizer = layer(student, "middle").weight_quantizer
    assert isinstance(quantizer, Affine) and quantizer.scale.shape == (8, 1, 1, 1)
    assert isinstance(student.norm, nn.Identity), "merged into the convolution before it"


def pruned() -> nn.Module:
    network = Net()
    prune.l1_unstructured(network.middle, "weight", 0.5)
    return network


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"weight": "lsk"}, "did you mean 'lsq'"),
        ({"bits": {"middel": (2, 2)}}, "layer 'middel' cannot be quantized: no such layer; did you mean 'middle'"),
        ({"weight_bits": 40}, "40"),
        ({"images": []}, "images must be a tensor, or batches"),
        ({"options": ["quantize.wieght.init=range"]}, "wieght"),
        ({"model": "resnet18"}, "model must be a network, a torch.nn.Module, got 'resnet18'"),
        ({"model": nn.Linear}, "model must be a network, a torch.nn.Module, got the class Linear"),
        ({"weight": 4}, "weight is a name from conf/ or what makes it, such as a class, got 4; weight_bits"),
        ({"granularity": 3}, "granularity is a name from conf/ or an object of qtrain.spec, got 3"),
        ({"bits": 4}, "bits is a search's name or the bits of each layer by its name, got 4; weight_bits"),
        ({"bits": {"middle": 4}}, r"bits of 'middle' must be two, \(weight, input\), got 4"),
        ({"bits": {"middle": ("a", 4)}}, "bits of 'middle' must be two"),
        ({"ends": 8}, r"ends are the two widths of first and last layer, such as \(8, 8\), got 8"),
        ({"widths": 4}, r"such as \[8, 4, 2\], got 4"),
        ({"operations": ["add"]}, r"operations must be a mapping such as {'add': 8}, got \['add'\]"),
        ({"bits": "integer_program", "budgets": "120 kB"}, "budgets must be a mapping such as"),
        ({"policies": ["six"]}, "policies must be a mapping"),
        ({"policies": {"six": 6}}, "policies: 'six' must be a qtrain.Policy, got 6"),
        ({"images": 3, "bits": "integer_program"}, "images must be a tensor, or batches of images, got 3"),
        ({"images": 3}, "images must be a tensor, or batches of images, got 3"),
        ({"images": torch.zeros(8, 3, 8, 8, dtype=torch.uint8)}, "images must be floats, normalized as in training"),
        ({"images": torch.zeros(0, 3, 8, 8)}, r"shape \(0, 3, 8, 8\); give one that is not empty"),
        ({"images": torch.zeros(8, 1, 8, 8)}, r"Net fails on images \(1, 1, 8, 8\): RuntimeError"),
        ({"images": TensorDataset(torch.zeros(4, 3, 8, 8))}, "a DataLoader in the place of a dataset"),
        ({"policies": [torch.zeros(3, 3)]}, "policies must be a mapping"),
        ({"model": pruned()}, "Net cannot be copied .*; a weight that is computed from others becomes plain by"),
    ],
)
def test_a_wrong_choice_is_one_line(model: nn.Module, choices: dict[str, Any], message: str) -> None:
    arguments = {"model": model, "images": images(), **choices}
    with pytest.raises(ValueError, match=message) as caught:
        qtrain.quantize(**arguments)
    assert "\n" not in str(caught.value)


def test_widths_may_be_numbers_of_numpy(model: nn.Module) -> None:
    student = qtrain.quantize(model, images(), bits={"middle": [np.int64(3), np.int64(5)]})
    assert qtrain.describe(student).layers["middle"] == LayerBits(3, 5)


@pytest.mark.parametrize(
    "call", [qtrain.describe, lambda s: qtrain.distill(s, []), lambda s: qtrain.verify(s, "x", [])]
)
def test_other_calls_want_a_network_too(call: Any) -> None:
    with pytest.raises(ValueError, match=r"student must be a network, a torch\.nn\.Module, got 'resnet18'"):
        call("resnet18")


def test_a_network_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="has no layer that can be quantized"):
        qtrain.quantize(nn.Sequential(nn.ReLU()), images())


def test_a_search_gives_bits_within_its_budgets(model: nn.Module) -> None:
    batches = [(batch, torch.tensor([0, 1])) for batch in images().split(2)]
    student = qtrain.quantize(model, iter(batches), weight_bits=3, ends=None, bits="integer_program")
    uniform = qtrain.quantize(model, images(), weight_bits=3, ends=None)
    found, same = (qtrain.cost(one, images()) for one in (student, uniform))
    assert found.size_bytes <= same.size_bytes
    assert found.bops <= same.bops
    assert qtrain.describe(student).layers != qtrain.describe(uniform).layers
    small = qtrain.quantize(model, images(), ends=None, bits="pareto", budgets={"size_bytes": "85%"})
    cost = qtrain.cost(qtrain.quantize(model, images(), ends=None), images())
    assert qtrain.cost(small, images()).size_bytes <= 0.85 * cost.size_bytes


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"budgets": {"size_bytes": 100}}, "budgets are for a search"),
        ({"bits": "integer_programme"}, "integer_program"),
        ({"bits": "integer_program", "budgets": {"size_bytes": 10}}, "size_bytes: 10 bytes cannot be reached"),
        ({"bits": "integer_program", "budgets": {"time": "3 ms"}}, "there is no such cost"),
    ],
)
def test_a_search_that_cannot_be_is_refused_in_one_line(
    model: nn.Module, choices: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        qtrain.quantize(model, images(), **choices)
    assert "\n" not in str(refused.value)


def test_the_callers_random_numbers_go_on_as_before() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    qtrain.quantize(Net(), torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    drawn = torch.rand(3)
    torch.manual_seed(5)
    Net()
    assert torch.equal(drawn, torch.rand(3)), "those that the network itself took alone"
    assert not torch.equal(drawn, expected)


class Scaling(nn.Conv2d):
    """A convolution that has a factor, a buffer and a number for whoever calls it."""

    def __init__(self) -> None:
        super().__init__(3, 4, 3)
        self.gain, self.k = 0.5, nn.Parameter(torch.full((4, 1, 1), 2.0))
        self.register_buffer("shift", torch.ones(1), persistent=False)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c: Any = Scaling()
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.c(x) * self.c.gain * self.c.k + self.c.shift
        logits: torch.Tensor = self.head(y.mean((2, 3)))
        return logits


def test_a_layer_keeps_what_its_own_class_added() -> None:
    torch.manual_seed(0)
    network, images = Scaled(), torch.rand(4, 3, 8, 8)
    student = qtrain.quantize(network, images, weight_bits=8, input_bits=8)
    assert "c" in qtrain.describe(student).layers
    assert set(network.state_dict()) <= set(student.state_dict())
    expected = network(images)
    assert (student(images) - expected).abs().max() < 0.1 * expected.abs().max()


class Remembers(nn.Module):
    """Keeps an activation, as networks do that others look into."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(144, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last = self.conv(x)
        logits: torch.Tensor = self.head(self.last.flatten(1))
        return logits


def test_a_network_that_keeps_an_activation_is_copied(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, images = Remembers(), torch.rand(4, 3, 8, 8)
    network(images)
    student = qtrain.quantize(network, images)
    student(images)
    assert qtrain.export(student, tmp_path / "x.onnx", images).passed


def test_a_student_is_not_quantized_again() -> None:
    student = qtrain.quantize(nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Linear(4, 3)), torch.rand(2, 3, 2, 2))
    with pytest.raises(ValueError, match="model is a student already, it has "):
        qtrain.quantize(student, torch.rand(2, 3, 2, 2))


def test_what_the_student_cannot_compute_is_said_at_once() -> None:
    network = nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(256, 5))
    with pytest.raises(ValueError, match="XNOR: the scale map is defined for") as error:
        qtrain.quantize(
            network, torch.rand(2, 3, 8, 8), weight="bwn", input="xnor", weight_bits=1, input_bits=1, ends=None
        )
    assert "\n" not in str(error.value)
