"""Scales are moved to where a runtime needs no operation of its own, and the student computes with them."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

import qtrain
from qtrain.convert.layers import set_quantization
from qtrain.deployment.benchmark.integers import in_integers
from qtrain.deployment.onnx.lowering import lower
from qtrain.deployment.onnx.scales import settle_gates_, settle_tops_
from qtrain.deployment.onnx.symbolic import CodedGate
from qtrain.deployment.onnx.write import export
from qtrain.deployment.parity.verify import verify

FAST = {"weight_observer": "min_max", "input_observer": "min_max", "weight_bits": 8, "input_bits": 8}
WIDE = ["quantize.input.init=mean_abs"]
SIZE = (3, 8, 8)


class Net(nn.Module):
    """A layer, an activation, and two layers that read it, one of them behind a pool."""

    def __init__(self, act: Callable[[Tensor], Tensor], largest: float = 12.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.act = nn.Conv2d(3, 8, 3), act
        self.left, self.right, self.head = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 5)
        with torch.no_grad():
            self.stem.weight.mul_(largest / float(self.stem(images()).max()))
            self.stem.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        x = F.max_pool2d(self.left(x), 2) + self.right(F.max_pool2d(x, 2))
        return self.head(x.mean((2, 3)))


def images() -> Tensor:
    return torch.randn(8, *SIZE, generator=torch.Generator().manual_seed(0))


def scale(student: nn.Module, name: str) -> float:
    return float(student.get_submodule(name).input_quantizer.step().detach())


def operators(student: nn.Module) -> Counter[str]:
    return Counter(node.op_type for node in export(student, SIZE).model.graph)


def test_the_top_code_is_6_behind_a_relu6_and_the_file_has_no_clip(caplog: pytest.LogCaptureFixture) -> None:
    model = Net(nn.ReLU6()).eval()
    learned = qtrain.quantize(model, images(), **FAST, options=WIDE, operations={"max_pool": 8, "add": 8})
    assert 255 * scale(learned, "left") > 6.5 and operators(learned)["Clip"] > 0
    with caplog.at_level(logging.INFO, logger="qtrain"):
        student = qtrain.quantize(model, images(), **FAST, options=WIDE, target="onnxruntime")
    assert scale(student, "left") == pytest.approx(6 / 255, rel=1e-6)
    assert student.left.input_quantizer is student.max_pool_1.input.input_quantizer
    assert operators(student)["Clip"] == 0
    assert [r.getMessage() for r in caplog.records if "top codes" in r.getMessage()] == [
        "the top codes of 3 layers' inputs are where their activation ends: left, max_pool_1.input, right"
    ]
    verdict = verify(student, [images()], SIZE)
    assert verdict.passed and {layer.differing for tier in verdict.tiers for layer in tier.layers.values()} == {0}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("act", "end"),
    [
        (nn.Hardtanh(0.0, 4.0), 4.0),
        (F.relu6, 6.0),
        (lambda x: F.hardtanh(x, 0.0, 4.0), 4.0),
        (lambda x: torch.clamp(x, 0, 5), 5.0),
        (lambda x: x.clamp(min=0, max=5), 5.0),
        (nn.Sequential(BatchNormAct2d(8, act_layer=nn.ReLU6), nn.Dropout()), 6.0),
    ],
)
def test_every_form_of_a_clip_from_0_is_known(act: Callable[[Tensor], Tensor], end: float, bits: int) -> None:
    student = qtrain.quantize(Net(act).eval(), images(), **{**FAST, "input_bits": bits}, options=WIDE)
    with torch.no_grad():
        student.left.input_quantizer.scale.fill_(7 / (2**bits - 1))
    assert settle_tops_(student)[0] == "left"
    assert scale(student, "left") == pytest.approx(end / (2**bits - 1), rel=1e-6)


@pytest.mark.parametrize("act", [nn.ReLU(), nn.Hardtanh(-1.0, 4.0), lambda x: x.clamp(max=5)])
def test_scales_behind_other_activations_stay(act: Callable[[Tensor], Tensor]) -> None:
    student = qtrain.quantize(Net(act).eval(), images(), **FAST, options=WIDE)
    assert settle_tops_(student) == []


def test_a_top_code_below_6_stays_and_so_does_one_that_other_values_need() -> None:
    below = qtrain.quantize(Net(nn.ReLU6()).eval(), images(), **FAST, options=WIDE)
    with torch.no_grad():
        for name in ("left", "right"):
            below.get_submodule(name).input_quantizer.scale.fill_(5 / 255)
    assert settle_tops_(below) == [] and scale(below, "left") == pytest.approx(5 / 255)

    class Twice(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.left(torch.relu(self.left(self.act(self.stem(x)))))
            return self.head(x.mean((2, 3)))

    twice = qtrain.quantize(Twice(nn.ReLU6()).eval(), images(), **FAST, options=WIDE)
    with torch.no_grad():
        twice.left.input_quantizer.scale.fill_(9 / 255)
    assert settle_tops_(twice) == []


def test_a_students_file_holds_the_settled_scales(tmp_path: Path) -> None:
    student = qtrain.quantize(small(), images(), **FAST, options=WIDE, target="onnxruntime")
    qtrain.save(student, tmp_path / "student.safetensors", builder=small)
    loaded = qtrain.load(tmp_path / "student.safetensors", builders=[__name__.split(".")[0]])
    assert scale(loaded, "left") == scale(student, "left") == pytest.approx(6 / 255, rel=1e-6)
    with torch.no_grad():
        assert torch.equal(loaded(images()), student(images()))


def small() -> nn.Module:
    return Net(nn.ReLU6()).eval()


class Gated(nn.Module):
    """A hard swish, and a hard sigmoid that gates channels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.swish = nn.Conv2d(3, 8, 3), nn.Hardswish()
        self.squeeze, self.gate, self.head = nn.Conv2d(8, 8, 1), nn.Hardsigmoid(), nn.Linear(8, 5)
        with torch.no_grad():
            self.stem.weight.mul_(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.swish(self.stem(x))
        x = x * self.gate(self.squeeze(x.mean((2, 3), keepdim=True)))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("bits", [8, 6])
def test_gates_are_clipped_codes_and_all_runs_in_integers(bits: int) -> None:
    pytest.importorskip("onnxruntime")
    student = qtrain.quantize(Gated().eval(), images(), **FAST, target="onnxruntime", operations={"activation": bits})
    for name in ("swish.input", "gate.input"):
        assert 3 / scale(student, name) == pytest.approx(round(3 / scale(student, name)), rel=1e-6)
    found = operators(student)
    assert (found["HardSwish"], found["HardSigmoid"], found["Mul"]) == (0, 0, 2)
    data = export(student, SIZE).to_bytes()
    counted = in_integers(data, SIZE)
    assert counted.share == 1.0 and counted.operators(integer=True)["QLinearMul"] == 2
    verdict = verify(student, [images()], SIZE, data)
    assert verdict.passed, [tier.faults for tier in verdict.tiers]
    exact = {tier.name: sum(layer.differing for layer in tier.layers.values()) for tier in verdict.tiers}
    assert (exact["reference"], exact["onnxruntime, unoptimized"]) == (0, 0)


def test_a_hard_swish_inside_a_merged_norm_is_clipped_codes_too() -> None:
    act = BatchNormAct2d(8, act_layer=nn.Hardswish)
    student = qtrain.quantize(Net(act).eval(), images(), **FAST, target="onnxruntime")
    found = operators(student)
    assert (found["HardSwish"], found["HardSigmoid"], found["BatchNormalization"], found["Mul"]) == (0, 0, 0, 1)


def test_off_a_student_with_gates_computes_what_it_was_made_from() -> None:
    model = Gated().eval()
    student = qtrain.quantize(copy.deepcopy(model), images(), **FAST, target="onnxruntime")
    with torch.no_grad():
        assert not torch.equal(student(images()), model(images()))
        set_quantization(student, enabled=False)
        model.load_state_dict(student.state_dict(), strict=False)  # whose biases are whole numbers of steps
        assert torch.equal(student(images()), model(images()))


@pytest.mark.parametrize(("reach", "settled"), [(1.0, False), (2.0, True), (40.0, True)])
def test_a_hard_swish_keeps_its_scale_where_half_of_its_codes_would_be_lost(reach: float, settled: bool) -> None:
    student = qtrain.quantize(Gated().eval(), images(), **FAST, operations={"activation": 8})
    with torch.no_grad():
        student.swish.input.input_quantizer.scale.fill_(reach / 128)
    before = scale(student, "swish.input")
    done, others = settle_gates_(student)
    assert ("swish" in done, "swish" in others) == (settled, not settled)
    assert (scale(student, "swish.input") != before) is settled
    assert isinstance(lower(student).model.get_submodule("swish"), CodedGate) is settled


def test_a_gate_alone_takes_any_scale_but_not_codes_without_a_sign() -> None:
    student = qtrain.quantize(Gated().eval(), images(), **FAST, operations={"activation": 8})
    with torch.no_grad():
        student.gate.input.input_quantizer.scale.fill_(0.2 / 128)
    assert "gate" in settle_gates_(student)[0]
    assert scale(student, "gate.input") == pytest.approx(3 / 128)
    student.gate.input.input_quantizer.set_range_(bits=8, signed=False)
    assert "gate" in settle_gates_(student)[1]
    assert not isinstance(lower(student).model.get_submodule("gate"), CodedGate)
