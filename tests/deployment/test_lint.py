"""What a target computes in floating point is said layer by layer, with the reason."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qtrain
from qtrain.config.compose import compose
from qtrain.convert.target import Target
from qtrain.deployment import lint as lint_module
from qtrain.deployment.lint import Finding, lint, summary
from qtrain.utils.errors import ConfigError


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
    return {(one.layer, one.effect): one.reason for one in lint(student, target(), qtrain.describe(student).skipped)}


@pytest.mark.usefixtures("exact_sums")
def test_what_stays_in_floating_point_is_named_with_its_reason() -> None:
    reasons = found()
    assert reasons[("late", "float")] == "BatchNorm2d: no quantized layer directly before it"
    assert ("the network's own parameters", "float") in reasons
    assert ("table", "float") in reasons  # multiplied without being a layer's
    assert len(reasons) == 3, "sigmoid and hard swish run in integers, and the first norm is merged"


@pytest.mark.usefixtures("exact_sums")
def test_activations_without_integers_are_named() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Conv2d(8, 8, 1), nn.Flatten()).eval()
    student = qtrain.quantize(model, torch.randn(2, 3, 8, 8), target="onnxruntime")
    (finding,) = lint(student, target())
    assert finding.layer == "1" and finding.reason.startswith("gelu: it has integers for sigmoid, leaky ReLU, hard")
    narrow = qtrain.quantize(Net().eval(), torch.randn(2, 3, 8, 8), target="onnxruntime")
    with torch.no_grad():
        narrow.act.input.input_quantizer.scale.fill_(0.5 / 128)
    reasons = {one.layer: one.reason for one in lint(narrow, target())}
    assert reasons["act"] == "hardswish: 3 cannot be a whole number of steps of what it reads"


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
