"""What a target computes in floating point is said layer by layer, with the reason."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qtrain
from qtrain.config.compose import compose
from qtrain.convert.target import Target
from qtrain.deployment import lint as lint_module
from qtrain.deployment.benchmark.integers import in_integers
from qtrain.deployment.lint import Finding, lint, summary
from qtrain.deployment.onnx.write import export
from qtrain.utils.errors import ConfigError

EXAMPLE = torch.zeros(1, 3, 8, 8)


class Function(nn.Module):
    """A function in a module of its own, which then has a name; ``further`` are its parameters and modules."""

    def __init__(self, function: Callable[..., Tensor], *further: Tensor | nn.Module) -> None:
        super().__init__()
        self.function = function
        self.parts = nn.ModuleList(part for part in further if isinstance(part, nn.Module))
        self.numbers = nn.ParameterList(part for part in further if isinstance(part, Tensor))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.parts, *self.numbers)


def conv(width: int = 8) -> nn.Conv2d:
    return nn.Conv2d(width, 8, 1)


CHAINS: dict[str, dict[str, Callable[[], nn.Module]]] = {
    "operations without a kernel": {
        "prelu": nn.PReLU, "gelu": nn.GELU, "silu": lambda: Function(F.silu), "softmax": lambda: nn.Softmax(1),
        "softmax_function": lambda: Function(lambda x: x.softmax(1)), "sine": lambda: Function(torch.sin),
        "square": lambda: Function(lambda x: x**2), "transposed": lambda: nn.ConvTranspose2d(8, 8, 2, stride=2),
        "with_number": lambda: Function(lambda x: x + 1.0),
        "with_parameter": lambda: Function(lambda x, p: x * p, torch.rand(1, 8, 1, 1)),
        "channels": lambda: Function(lambda x: x - x.mean(1, keepdim=True)),
        "linear_resize": lambda: nn.Upsample(size=8, mode="bilinear"),
        "larger": lambda: Function(lambda x: F.interpolate(x, scale_factor=2, mode="nearest")),
    },
    "norms": {
        "behind_pool": lambda: nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.BatchNorm2d(8)),
        "instance": lambda: nn.InstanceNorm2d(8), "function": lambda: Function(lambda x: F.layer_norm(x, (8, 8))),
        "layer": lambda: Function(lambda x, n: n(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), nn.LayerNorm(8)),
        "twice": lambda: Function(lambda x, n, f: n(x) + n(f(x)), nn.BatchNorm2d(8), conv()),
    },
    "what integers can do": {
        "relu6": nn.ReLU6, "leaky": lambda: nn.LeakyReLU(0.1), "sigmoid": nn.Sigmoid, "gate": nn.Hardswish,
        "residual": lambda: Function(lambda x, f: torch.relu(f(x) + x), conv()),
        "concatenated": lambda: Function(lambda x, f, g: g(torch.cat((x, f(x)), 1)), conv(), conv(16)),
        "shuffled": lambda: Function(lambda x: x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)),
        "sliced": lambda: Function(lambda x: x[:, :, :, 1:]), "pool": lambda: nn.MaxPool2d(3, 1, 1),
        "merged": lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU()),
    },
    "layers whose outputs are read in floating point": {
        "tokens": lambda: Function(lambda x, f: f(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), nn.Linear(8, 8)),
        "both": lambda: Function(lambda x, f, g: f(x) + g(x), conv(), nn.Sequential(conv(), Function(torch.sin))),
        "average": lambda: Function(
            lambda x, f: x * f(x), nn.Sequential(nn.AdaptiveAvgPool2d(1), Function(lambda x: 2 * x))
        ),
        "one_float": lambda: Function(lambda x, f, g: g(torch.cat((x, f(x)), 1)), Function(torch.cos), conv(16)),
        "padded": lambda: Function(lambda x: F.pad(x, (1, 1, 1, 1))),
        "wide": lambda: Function(lambda x: x.repeat(1, 1, 2, 1)),
    },
}  # fmt: skip
"""Chains of modules, each with a convolution before it."""


def chain(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict({"stem": nn.Conv2d(3, 8, 1)}))
    for number, (child, make) in enumerate(CHAINS[name].items()):
        model.add_module(child, make())
        model.add_module(f"conv{number}", conv())
    model.add_module("mean", nn.AdaptiveAvgPool2d(1))
    model.add_module("flat", nn.Flatten())
    model.add_module("head", nn.Linear(8, 5))
    return model.eval()


@pytest.mark.usefixtures("exact_sums")
@pytest.mark.parametrize("name", CHAINS)
def test_what_is_said_to_be_in_floating_point_is_so_in_the_runtimes_graph_and_nothing_else(name: str) -> None:
    student = qtrain.quantize(
        chain(name), torch.randn(4, 3, 8, 8), input_bits=8, target="onnxruntime", input_observer="min_max", ends=None
    )
    said = {one.layer for one in qtrain.describe(student, "onnxruntime").findings if one.effect == "float"}
    counted = in_integers(export(student, (3, 8, 8)).to_bytes(), (3, 8, 8))
    found = {module_in(student, layer.name) for layer in counted.layers if not layer.integer}
    assert said == found
    assert (name == "what integers can do") is not bool(found)


def module_in(student: nn.Module, node: str) -> str:
    """The qualified name of the module that a ``node`` of the runtime's graph is named after."""
    names = {name for name, _ in student.named_modules() if name and node.startswith(f"{name}.")}
    return max(names, key=len).removesuffix(".function")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.late = nn.BatchNorm2d(8)
        self.conv, self.act = nn.Conv2d(8, 8, 1), nn.Hardswish()
        self.table = nn.Parameter(torch.ones(8, 8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = torch.sigmoid(self.act(self.conv(self.late(x))))
        return self.head(x.mean((2, 3)) @ self.table)


@pytest.fixture
def exact_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lint_module, "saturates_in_16_bits", lambda: False)


def target(name: str = "onnxruntime") -> Target:
    component = compose([f"target={name}"]).target
    assert component is not None
    made: Target = component.build()
    return made


def found(**choices: object) -> dict[tuple[str, str], str]:
    torch.manual_seed(0)
    options = {"weight_bits": 8, "input_bits": 8, "target": "onnxruntime", **choices}
    student = qtrain.quantize(Net().eval(), torch.randn(2, 3, 8, 8), **options)  # type: ignore[arg-type]
    return {
        (one.layer, one.effect): one.reason
        for one in lint(student, target(), EXAMPLE, qtrain.describe(student).skipped)
    }


@pytest.mark.usefixtures("exact_sums")
def test_what_stays_in_floating_point_is_named_with_its_reason() -> None:
    reasons = found()
    assert reasons[("late", "float")] == "BatchNorm2d: no quantized layer directly before it"
    assert reasons[("the network", "float")] == "matmul: not all that it works on is quantized"
    assert ("table", "float") in reasons  # multiplied without being a layer's
    said = "mean: what it gives is not quantized at once, but read by matmul"
    assert [layer for (layer, _), reason in reasons.items() if reason == said] == ["average_pool_2"]
    assert len(reasons) == 4, "sigmoid and hard swish run in integers, and the first norm is merged"


@pytest.mark.usefixtures("exact_sums")
def test_activations_without_integers_are_named() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Conv2d(8, 8, 1), nn.Flatten()).eval()
    student = qtrain.quantize(model, torch.randn(2, 3, 8, 8), target="onnxruntime")
    said = {one.layer: one.reason for one in lint(student, target(), EXAMPLE)}
    assert said.keys() == {"1", "2"} and said["1"].startswith("gelu: it has integers for sigmoid, leaky ReLU, hard")
    assert said["2"] == "what it gives is not quantized at once, but read by the network's output"
    assert {one.layer for one in lint(student, target("openvino"), EXAMPLE)} == {"1"}, (
        "it runs layers before floats too"
    )
    narrow = qtrain.quantize(Net().eval(), torch.randn(2, 3, 8, 8), target="onnxruntime")
    with torch.no_grad():
        narrow.act.input.input_quantizer.scale.fill_(0.5 / 128)
    reasons = {one.layer: one.reason for one in lint(narrow, target(), EXAMPLE)}
    assert reasons["act"] == "hardswish: 3 cannot be a whole number of steps of what it reads"


class Rows(nn.Module):
    """Goes through the images one by one, as a trace cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.norm = nn.GELU(), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.act(torch.stack([image * 2 for image in x])))


@pytest.mark.usefixtures("exact_sums")
def test_a_module_that_cannot_be_traced_is_unknown_but_for_what_it_is_made_of() -> None:
    layers = [nn.Conv2d(3, 8, 1), Rows(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 5, 1), nn.Flatten()]
    model = nn.Sequential(*layers)
    student = qtrain.quantize(model.eval(), torch.randn(2, 3, 8, 8), target="onnxruntime")
    said = {(one.layer, one.effect): one.reason for one in lint(student, target(), EXAMPLE)}
    assert said[("1", "unknown")] == "what it computes: it cannot be traced"
    assert said[("0", "float")] == "what it gives is not quantized at once, but read by rows of 1"
    assert said[("1.norm", "float")] == "LayerNorm: no integer kernel"
    assert said[("1.act", "float")].startswith("gelu: it has integers for sigmoid")
    assert ("2", "float") not in said


@pytest.mark.usefixtures("exact_sums")
def test_widths_that_only_shorten_the_file_are_named() -> None:
    reasons = found(weight_bits=4, input_bits=3)
    assert reasons[("conv", "size only")] == "weights of 4 bits are computed in 8, inputs of 3 bits are computed in 8"
    assert ("stem", "size only") not in reasons  # 8 bits, as the first layer


@pytest.mark.usefixtures("exact_sums")
def test_weights_and_inputs_without_integers_are_named() -> None:
    assert found(weight="kmeans", weight_bits=4)[("conv", "float")].startswith(
        "weights of KMeans are not evenly spaced"
    )
    assert found(input="dynamic")[("conv", "refused")].startswith("its input has no form in ONNX: Dynamic")
    assert found(input_bits=16)[("conv", "float")] == "inputs of 16 bits are more than the 8 that it computes with"
    assert found(weight_bits=32)[("conv", "float")] == "its weight has no bits"


@pytest.mark.parametrize(("bits", "said"), [(8, True), (7, False)])
def test_saturation_is_said_where_the_processor_has_it(bits: int, said: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lint_module, "saturates_in_16_bits", lambda: True)
    effects = {effect for _, effect in found(weight_bits=bits, ends=None)}
    assert ("saturates" in effects) is said


def test_one_line_counts_what_is_in_integers() -> None:
    student = qtrain.quantize(Net().eval(), torch.randn(2, 3, 8, 8), target="onnxruntime")
    line = summary(
        [Finding("act", "float", "Hardswish: none"), Finding("conv", "size only", "4 in 8")], student, target()
    )
    assert line == (
        "target onnxruntime: 6 of 7 layers and operations in integers; 1 not, the first act: float: Hardswish: none; "
        "1 with bits that only shorten the file"
    )
    assert summary([], student, target()) == "target onnxruntime: 7 of 7 layers and operations in integers"


def test_the_task_prints_the_findings_and_needs_a_target(capsys: pytest.CaptureFixture[str]) -> None:
    from qtrain.tasks.lint import run

    overrides = ["task=lint", "data=digits", "model.width=0.25", "model.name=cifar_resnet8", "quantize.bits.weight=4"]
    effects = run(compose([*overrides, "target=onnxruntime"]))
    lines = capsys.readouterr().out.splitlines()
    assert effects["size only"] == sum(": size only: " in line for line in lines) > 0
    assert lines[-1].startswith("target onnxruntime: ")
    with pytest.raises(ConfigError, match=r"target: task=lint asks what a runtime computes; give target=onnxruntime"):
        run(compose(overrides))
