"""The gate notices every fault that is planted in a file, and names the layer."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn

import qtrain
from qtrain.deployment.integer import operators
from qtrain.deployment.onnx.write import export
from qtrain.deployment.parity import runtimes
from qtrain.deployment.parity import verify as gate
from qtrain.deployment.parity.runtimes import OnnxRuntime, Runtime
from qtrain.deployment.parity.verdict import Tier, Verdict
from qtrain.deployment.parity.verify import verify
from tests.deployment.onnx.networks import network
from tests.deployment.onnx.test_write import FAST, SIZE, images

Change = Callable[[np.ndarray], np.ndarray]


@pytest.fixture(scope="module")
def made() -> nn.Module:
    torch.manual_seed(0)
    return qtrain.quantize(network("residual").eval(), images(), weight_bits=4, input_bits=4, options=FAST)


@pytest.fixture(scope="module")
def file(made: nn.Module) -> bytes:
    return export(made, SIZE).to_bytes()


def changed(file: bytes, name: str, change: Change) -> bytes:
    """``file`` with ``change`` done to the constant ``name``."""
    model = onnx.load_from_string(file)
    for tensor in model.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor).copy()), name))
            return model.SerializeToString()
    raise AssertionError(f"{name} is no constant: {[tensor.name for tensor in model.graph.initializer]}")


def one_more(values: np.ndarray) -> np.ndarray:
    values.reshape(-1)[0] += 1
    return values


def one_ulp(values: np.ndarray) -> np.ndarray:
    values.reshape(-1)[0] = np.nextafter(values.reshape(-1)[0], np.float32(np.inf))
    return values


def by_name(verdict: Verdict) -> dict[str, Tier]:
    return {tier.name: tier for tier in verdict.tiers}


def test_an_untouched_file_passes(made: nn.Module, file: bytes) -> None:
    verdict = verify(made, [images(8), images(4)], SIZE, file)
    assert verdict.passed and verdict.images == 12
    assert [tier.name for tier in verdict.tiers] == [
        "constants", "reference", "reference of the file", "onnxruntime, unoptimized", "onnxruntime",
    ]  # fmt: skip


def test_large_images_are_compared_a_few_at_a_time(
    made: nn.Module, file: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths, simulate = [], gate.simulate

    def counted(student: nn.Module, some: Tensor, inputs: Any) -> Any:
        lengths.append(len(some))
        return simulate(student, some, inputs)

    seven = images(7)
    whole = verify(made, [seven], SIZE, file)
    monkeypatch.setattr(gate, "simulate", counted)
    monkeypatch.setattr(gate, "PIXELS", 3 * SIZE[1] * SIZE[2] + 1)
    parts = verify(made, [seven], SIZE, file)
    assert lengths == [3, 3, 1] and parts.images == whole.images == 7
    assert [tier.predicted for tier in parts.tiers] == [tier.predicted for tier in whole.tiers]
    monkeypatch.setattr(gate, "PIXELS", 1)
    lengths.clear()
    assert verify(made, [seven[:2]], SIZE, file).images == 2 and lengths == [1, 1]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("body.conv1.weight.codes", one_more),
        ("body.conv1.weight.scale", one_ulp),
        ("body.conv1.input.scale", one_ulp),
        ("head.bias.codes", one_more),
        ("body.conv1.weight.DequantizeLinear.zero_point", one_more),
    ],
)
def test_a_changed_constant_is_found_and_named(made: nn.Module, file: bytes, name: str, change: Change) -> None:
    verdict = verify(made, [images(4)], SIZE, changed(file, name, change))
    assert not verdict.passed
    (fault,) = verdict.tiers[0].faults
    assert fault.startswith(name)


def test_a_changed_operation_is_found_and_named(made: nn.Module, file: bytes) -> None:
    model = onnx.load_from_string(file)
    node = next(node for node in model.graph.node if node.op_type == "Relu")
    node.op_type = "Elu"
    tiers = by_name(verify(made, [images(4)], SIZE, model.SerializeToString()))
    assert tiers["constants"].faults == [f"{node.name}: the file computes something else"]
    assert tiers["reference"].faults == []
    assert tiers["reference of the file"].notes == [
        f"{node.name} computed in floating point (Elu has no integer form)"
    ]  # fmt: skip
    assert any(layer.differing for layer in tiers["reference of the file"].layers.values())


class Several(nn.Module):
    """Nodes without an integer form: of two inputs, of a list, of conditions, of shapes, with two outputs."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(F.elu(x), scale_factor=2, mode="bilinear")
        upper, lower = x.topk(4, dim=1).values, x[:, :4] / (1 + x[:, 4:].exp())
        return torch.cat([torch.where(upper > 0.3, upper, 0.1 * upper), torch.maximum(lower, upper)], dim=1)


def test_what_has_no_integer_form_is_computed_without_and_named() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), Several(), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    ).eval()  # fmt: skip
    student = qtrain.quantize(network, images(), weight_bits=4, input_bits=4, options=FAST)
    tiers = by_name(verdict := verify(student, [images(16)], SIZE))
    assert verdict.passed
    (note,) = tiers["reference"].notes
    assert "2.Elu and " in note and note.endswith("computed in floating point (Elu has no integer form)")
    assert not tiers["onnxruntime"].notes


def test_a_node_that_nothing_computes_is_a_fault(made: nn.Module, file: bytes) -> None:
    model = onnx.load_from_string(file)
    node = next(node for node in model.graph.node if node.op_type == "Relu")
    node.op_type = "SequenceLength"  # of a sequence of tensors, which nothing here is
    (fault,) = by_name(verify(made, [images(4)], SIZE, model.SerializeToString()))["reference of the file"].faults
    assert fault.startswith(f"it does not run: {node.name}: ")


def test_logits_that_the_last_layer_gives_otherwise_are_found(made: nn.Module, file: bytes) -> None:
    """Without looking at the constants: no code differs, since nothing behind the last layer is quantized."""
    right = by_name(verify(made, [images(4)], SIZE, file))
    assert right["reference"].logits_off < 1e-5 and right["onnxruntime"].logits_off < 1e-3
    moved = changed(file, "head.bias.codes", lambda codes: codes + codes.dtype.type(2**12))
    tiers = by_name(verify(made, [images(4)], SIZE, moved))
    for name in ("onnxruntime, unoptimized", "onnxruntime"):
        assert not any(layer.differing for layer in tiers[name].layers.values())
        assert tiers[name].faults[0].startswith("logits are off by ")
    assert tiers["reference of the file"].logits_off > 0.05


def test_another_rounding_is_found_and_the_layer_named(made: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = operators.multiplied

    def down(numbers: Tensor, factor: Tensor, bound: int) -> Tensor:
        return torch.div(exact(2 * numbers, factor, 2 * bound), 2, rounding_mode="floor")

    monkeypatch.setattr(operators, "multiplied", down)
    verdict = verify(made, [images(8)], SIZE)
    assert not verdict.passed
    assert verdict.tiers[1].faults[0].startswith("body.conv1: ")


@pytest.mark.parametrize(
    ("layer", "far"),
    [("body.depthwise", "body.norm_4.input"), ("body.grow", "body.concat_0.operands.1"), ("body.conv", None)],
)
def test_codes_that_another_weight_changes_are_found_where_they_arise(
    with_norms: tuple[nn.Module, bytes], layer: str, far: str | None
) -> None:
    """Without looking at the constants: the codes behind the layer differ, and no others."""
    student, data = with_norms
    verdict = verify(student, [images(4)], SIZE, changed(data, f"{layer}.weight.codes", lambda codes: -codes))
    for name in ("reference of the file", "onnxruntime"):
        tier = by_name(verdict)[name]
        differing = [layer for layer, found in tier.layers.items() if found.differing > 20]
        assert len(differing) == 1 and differing[0] == (far or differing[0]), differing
        assert name != "onnxruntime" or tier.faults[0].startswith(f"{differing[0]}: ")


def test_another_rounding_is_found_beside_norms_and_depthwise_layers(
    with_norms: tuple[nn.Module, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = operators.multiplied

    def up(numbers: Tensor, factor: Tensor, bound: int) -> Tensor:
        return exact(numbers, factor, bound) + 1

    monkeypatch.setattr(operators, "multiplied", up)
    tier = by_name(verify(with_norms[0], [images(2)], SIZE, with_norms[1]))["reference"]
    named = {fault.split(":")[0] for fault in tier.faults}
    assert {"body.depthwise", "body.up", "body.shrink"} & named


def test_a_file_that_does_not_run_fails_with_the_constant_and_the_runtimes_words(made: nn.Module, file: bytes) -> None:
    def too_wide(values: np.ndarray) -> np.ndarray:
        return np.concatenate([values, values], axis=1)

    tiers = by_name(verify(made, [images(4)], SIZE, changed(file, "body.conv1.weight.codes", too_wide)))
    assert tiers["constants"].faults == [
        "body.conv1.weight.codes: int8 of shape (8, 16, 3, 3), not int8 of (8, 8, 3, 3)"
    ]
    assert tiers["onnxruntime"].faults[0].startswith("it does not run: ")
    assert tiers["reference"].faults == []


def deployed(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[bytes], Runtime]:
    """ONNX Runtime, whose outputs are changed."""

    def make(model: bytes) -> Runtime:
        right = OnnxRuntime(model)

        def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return change(right(inputs))

        return run

    return make


@pytest.mark.parametrize(("steps", "passes"), [(1, True), (2, False)])
def test_a_runtime_may_be_one_step_away_in_a_layer(
    made: nn.Module, monkeypatch: pytest.MonkeyPatch, steps: int, passes: bool
) -> None:
    def one_layer(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        name = "body.conv2.input.Clip"
        if name in outputs:
            codes = outputs[name].clone()
            codes[0, 0, 0, :5] = (codes[0, 0, 0, :5] + steps) % 16
            return outputs | {name: codes}
        return outputs

    monkeypatch.setitem(runtimes.RUNTIMES, "onnxruntime", deployed(one_layer))
    verdict = verify(made, [images(4)], SIZE)
    tier = by_name(verdict)["onnxruntime"]
    layer = tier.layers["body.conv2"]
    assert (layer.fused, layer.unexplained, layer.steps) == (5, 0, steps)
    assert "5 by operations that the runtime fuses" in layer.cause
    assert verdict.passed is passes
    if not passes:
        (fault,) = tier.faults
        assert fault.startswith(f"body.conv2: {layer.differing} of 2048 codes differ, by up to 2 steps: ")


def test_another_class_without_a_tie_is_a_fault(made: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def last_two(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The logits of the network as a whole, not of the layers alone: what a runtime may fuse there."""
        logits = outputs["logits"]
        return {"logits": torch.cat([logits[:-2], logits[-2:].roll(1, dims=1)])} if len(outputs) == 1 else outputs

    monkeypatch.setitem(runtimes.RUNTIMES, "onnxruntime", deployed(last_two))
    x = images(4)
    differing = [i for i in (2, 3) if not ties_in(made, x[i : i + 1])]
    assert differing
    tier = by_name(verify(made, [x], SIZE))["onnxruntime"]
    assert [one.image for one in tier.disagreeing] == [2, 3]
    (fault,) = tier.faults
    numbers = ", ".join(map(str, differing))
    assert fault == f"images {numbers}: another class is predicted, and no tie explains it (although no code differs)"


def ties_in(made: nn.Module, image: Tensor) -> int:
    """The codes that differ in ONNX Runtime for one image alone."""
    layers = by_name(verify(made, [image], SIZE))["onnxruntime, unoptimized"].layers.values()
    return sum(layer.differing for layer in layers)


def test_a_prediction_that_a_tie_changes_is_listed_with_its_layer() -> None:
    reasons = {"conv1": {"ties": 2, "fused": 1}, "conv2": {"fused": 3}}
    expected, found = torch.tensor([1.0, 0.5, 0.0]), torch.tensor([0.5, 1.0, 0.0])
    one = gate.disagreement(7, reasons, expected, found)
    assert (one.image, one.cause, one.explained) == (
        7, "conv1: 2 ties at a half, 1 by operations that the runtime fuses", True,
    )  # fmt: skip
    assert not gate.disagreement(7, {"conv2": {"fused": 3}}, expected, found).explained
    assert not gate.disagreement(7, {}, expected, found).explained


def test_a_prediction_between_two_equal_classes_is_a_tie() -> None:
    one = gate.disagreement(7, {}, torch.tensor([1.0, 0.9999, 0.0]), torch.tensor([0.5, 1.0, 0.0]))
    assert one.explained and one.cause == "its two best classes are 0.0001 apart"


def test_many_other_predictions_are_remarked_on(made: nn.Module, file: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = verify(made, [images(12)], SIZE, file)
    assert not by_name(usual)["onnxruntime"].disagreeing and gate.AMPLIFIED not in str(usual)
    monkeypatch.setattr(gate, "MANY", -1.0)  # none are too many
    verdict = verify(made, [images(12)], SIZE, file)
    assert verdict.passed and gate.AMPLIFIED in by_name(verdict)["onnxruntime"].notes
    assert "accuracy on labeled images" in str(verdict)


@pytest.mark.parametrize(("bits", "shown"), [(8, True), (4, False)])
def test_sums_in_16_bits_are_shown_and_not_judged_where_the_processor_has_no_others(
    monkeypatch: pytest.MonkeyPatch, bits: int, shown: bool
) -> None:
    def saturated(data: bytes, **options: bool) -> Runtime:
        right = OnnxRuntime(data, **options)

        def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            outputs = right(inputs)
            name = "body.conv2.input.QuantizeLinear"
            if options.get("exactly") is False and name in outputs:
                outputs[name] = (outputs[name] - 9).clamp(min=0)
            return outputs

        return run

    monkeypatch.setattr(gate, "saturates_in_16_bits", lambda: True)
    monkeypatch.setattr(gate, "OnnxRuntime", saturated)
    torch.manual_seed(0)
    options = [*FAST, "quantize.weight.init=range"]  # the largest weight has the largest code
    made = qtrain.quantize(
        network("residual").eval(), images(), weight_bits=bits, input_bits=bits, ends=None, options=options
    )
    verdict = verify(made, [images(4)], SIZE)
    tiers = by_name(verdict)
    assert ("onnxruntime, sums in 16 bits" in tiers) is shown
    assert verdict.passed
    if shown:
        layer = tiers["onnxruntime, sums in 16 bits"].layers["body.conv2"]
        assert layer.steps > 1 and layer.saturated > 100
        assert f"{layer.saturated} by sums that saturate in 16 bits" in layer.cause


def test_the_verdict_is_printed_with_one_line_for_each_comparison(made: nn.Module, file: bytes) -> None:
    verdict = verify(made, [images(4)], SIZE, changed(file, "body.conv1.weight.codes", one_more))
    lines = str(verdict).splitlines()
    assert len(lines) == len(verdict.tiers)
    assert lines[0] == "constants: FAILED: body.conv1.weight.codes: 1 of its bytes are not the student's"
    assert lines[1].startswith("reference: ") and "codes differ" in lines[1]
    assert verdict.faults[0] == "constants: body.conv1.weight.codes: 1 of its bytes are not the student's"
