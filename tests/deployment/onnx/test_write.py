"""What is exported computes what was trained: small networks of every kind, each through the whole gate."""

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import timm
import torch
from torch import Tensor, nn

import qtrain
from qtrain.deployment.integer import binary
from qtrain.deployment.onnx.write import export
from qtrain.deployment.parity.verify import verify
from tests.deployment.onnx.networks import BODIES, network

SIZE = (3, 8, 8)
FAST = ("observer@quantize.weight_observer=min_max", "observer@quantize.input_observer=min_max")


def images(count: int = 16) -> Tensor:
    return torch.rand(count, *SIZE, generator=torch.Generator().manual_seed(0))


def student(body: str, *, bits: int = 4, fold: str = "none", gammas: Tensor | None = None, **choices: Any) -> nn.Module:
    torch.manual_seed(0)
    model = network(body).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.bias, -0.3, 0.3)
            with torch.no_grad():
                module.weight.copy_(torch.linspace(-1, 1.5, len(module.weight)) if gammas is None else gammas)
    choices = {"weight_bits": bits, "input_bits": bits, "options": FAST, **choices}
    return qtrain.quantize(model, images(), fold=fold, **choices)


CASES = [(body, bits) for number, body in enumerate(BODIES) for bits in ((2, 8) if number % 2 else (8, 2))]


@pytest.mark.parametrize(
    ("body", "bits"),
    [pytest.param(*case, marks=[pytest.mark.slow] if number % 2 else []) for number, case in enumerate(CASES)],
)
def test_every_layer_of_the_export_gives_the_trained_codes(body: str, bits: int) -> None:
    verdict = verify(student(body, bits=bits), [images()], SIZE)
    assert verdict.passed, [tier.faults for tier in verdict.tiers]
    reference = verdict.tiers[1]
    assert all(layer.differing == layer.ties for layer in reference.layers.values())
    assert len(reference.layers) >= 2 and verdict.images == 16


OPERATIONS = (*FAST, "quantize.operations.matmul=8", "quantize.operations.softmax=8")


@pytest.mark.parametrize("body", ["attention", pytest.param("test_vit", marks=pytest.mark.slow)])
def test_transformer_with_products_and_softmax_in_8_bits_passes_the_gate(body: str) -> None:
    torch.manual_seed(0)
    model = network(body) if body in BODIES else timm.create_model(body, num_classes=5, img_size=8, patch_size=2)
    made = qtrain.quantize(model.eval(), images(), weight_bits=8, input_bits=8, options=OPERATIONS)
    verdict = verify(made, [images()], SIZE, export(made, SIZE).to_bytes())
    assert verdict.passed, [tier.faults for tier in verdict.tiers]
    reference = verdict.tiers[1]
    assert all(any(kind in layer for layer in reference.layers) for kind in ("matmul", "softmax"))
    assert all(layer.differing == layer.ties for layer in reference.layers.values())


@pytest.mark.parametrize("fold", ["none", "before", "training"])
def test_batch_norm_leaves_no_node_of_its_own(fold: str) -> None:
    """Gammas of both signs, and one of zero, whose channel is its bias alone."""
    made = student("residual", fold=fold, gammas=torch.tensor([0.0, 1e-20, -1.0, 2.0, 0.5, -0.1, 1.0, 1.0]))
    model = export(made, SIZE).model
    assert {"BatchNormalization"}.isdisjoint(node.op_type for node in model.graph)
    verdict = verify(made, [images()], SIZE)
    assert verdict.passed, [tier.faults for tier in verdict.tiers]


@pytest.mark.slow
@pytest.mark.parametrize("weight", ["affine", "kmeans", "power_of_two", "mx", "lsq_plus", "bwn", "twn", "outlier"])
def test_weights_of_other_methods_give_the_students_logits(weight: str) -> None:
    bits = {"bwn": 1, "twn": 2}.get(weight, 4)
    made = student("residual", weight=weight, weight_bits=bits, input_bits=8, ends=None)
    verdict = verify(made, [images()], SIZE)
    assert verdict.passed, [tier.faults for tier in verdict.tiers]


@pytest.mark.parametrize(("body", "weight", "inputs"), [("residual", "bnn", "bnn"), ("depthwise", "bwn", "bnn_plus")])
def test_signs_are_multiplied_as_packed_words(
    body: str, weight: str, inputs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers of several bits are not; with both, the gate compares the same numbers."""
    words = []
    plain = binary.signed_products
    monkeypatch.setattr(binary, "signed_products", lambda *given: words.append(given) or plain(*given))
    made = student(body, weight=weight, input=inputs, weight_bits=1, input_bits=1, ends=None)
    verdict = verify(made, [images()], SIZE)
    assert verdict.passed, verdict.faults
    assert all(layer.differing == layer.ties for layer in verdict.tiers[1].layers.values())
    assert words
    words.clear()
    verify(student(body, weight=weight, weight_bits=1, input_bits=2, ends=None), [images()], SIZE)
    assert not words


@pytest.mark.parametrize("inputs", ["lsq_plus", "pact"])
def test_inputs_of_other_methods_give_the_students_codes(inputs: str) -> None:
    torch.manual_seed(0)
    made = qtrain.quantize(
        network("residual").eval(), images(), input=inputs, weight_bits=4, input_bits=4, options=FAST
    )
    verdict = verify(made, [images()], SIZE)
    assert verdict.passed, [tier.faults for tier in verdict.tiers]


def test_an_input_without_a_form_is_refused_with_the_layer_and_the_remedy() -> None:
    made = student("residual", input="dynamic")
    with pytest.raises(ValueError, match=r"^stem: its input has no form in ONNX: Dynamic.* takes its scale from each"):
        export(made, SIZE)


@pytest.mark.parametrize(("body", "bits"), [("residual", 4), ("transposed", 2)])
def test_packed_weights_take_half_a_byte_and_the_runtime_fuses_as_before(body: str, bits: int, tmp_path: Path) -> None:
    made = student(body, bits=bits, ends=None)
    plain, packed = export(made, SIZE), export(made, SIZE, packed=True)
    weights = [value for value in packed.model.graph.initializers.values() if str(value.name).endswith("weight.codes")]
    assert weights and all(value.dtype == ir.DataType.INT4 for value in weights)
    saved = sum(value.const_value.nbytes for value in weights if value.const_value is not None)
    assert len(packed.to_bytes()) < len(plain.to_bytes()) + 700 * len(weights) - saved
    verdict = verify(made, [images()], SIZE, packed.to_bytes())
    assert verdict.passed, verdict.faults
    assert kinds(packed.to_bytes(), tmp_path / "packed.onnx") == kinds(plain.to_bytes(), tmp_path / "plain.onnx")


def kinds(file: bytes, path: Path) -> Counter[str]:
    """The nodes of ``file`` after the runtime's optimizations."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 3
    ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def test_packed_weights_need_an_opset_that_has_them() -> None:
    with pytest.raises(ValueError, match=r"^weights: 4-bit codes need opset 21, got 20; take weights=bytes"):
        export(student("residual"), SIZE, opset=20, packed=True)


def test_equal_students_give_equal_bytes_and_no_path_of_the_machine() -> None:
    made = student("residual")
    data = export(made, SIZE, metadata={"bits": {"stem": [4, 4]}}).to_bytes()
    assert data == export(made, SIZE, metadata={"bits": {"stem": [4, 4]}}).to_bytes()
    assert b".py" not in data and b"/home" not in data
    assert b'{"stem": [4, 4]}' in data


@pytest.mark.parametrize("batch", [1, 7])
def test_any_batch_runs(batch: int) -> None:
    made = student("residual", bits=8)
    session = ort.InferenceSession(export(made, SIZE).to_bytes(), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": images(batch).numpy()})
    assert logits.shape == (batch, 5)
    np.testing.assert_allclose(logits, made(images(batch)).detach().numpy(), atol=0.05)


def test_exporting_says_nothing_of_the_exporters_own(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        export(student("grouped"), SIZE)
    assert not [record for record in caplog.records if record.name.startswith(("onnx", "torch"))]


def test_scales_of_the_outputs_of_a_transposed_convolution_in_groups_are_left_to_values() -> None:
    """One scale becomes several by the batch norm behind, and ONNX has no axis for these."""
    made = student("transposed in groups", granularity="tensor")
    assert "body.0" in export(made, SIZE).lowering.notes
    verdict = verify(made, [images()], SIZE)
    assert verdict.passed, [tier.faults for tier in verdict.tiers]


def test_a_zero_point_outside_of_the_codes_in_use_is_kept() -> None:
    """Weights that are all positive have codes far above their zero point, which a byte must hold too."""
    torch.manual_seed(0)
    model = network("called twice").eval()
    with torch.no_grad():
        model.body.conv.weight.uniform_(0.5, 0.6)
    made = qtrain.quantize(
        model,
        images(),
        weight="affine",
        weight_bits=8,
        input_bits=8,
        options=[*FAST, "quantize.weight.symmetric=false"],
    )
    verdict = verify(made, [images()], SIZE)
    assert verdict.passed, [tier.faults for tier in verdict.tiers]


def test_an_opset_that_is_too_old_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^opset: must be 18 or newer, got 17"):
        export(student("residual"), SIZE, opset=17)


def test_the_student_is_left_as_it_was() -> None:
    made = student("residual")
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    expected = made(images())
    made.train()
    verify(made, [images(2)], SIZE)
    assert made.training
    made.eval()
    assert before.keys() == made.state_dict().keys()
    assert torch.equal(made(images()), expected)


class SaysLen(nn.Module):
    """Flattens by ``len``, as many do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, 4)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x))
        return self.head(x.view(len(x), -1))


class ClassToken(SaysLen):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.rand(1, 1, 8))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.conv(x).flatten(2).transpose(1, 2)
        return self.head(torch.cat([self.token.expand(len(x), -1, -1), tokens], dim=1).mean(1))


class FixesNumber(SaysLen):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(x)).view(int(x.shape[0]), -1))


class Branches(SaysLen):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.head((x if x.mean() > 0 else -x).flatten(1))


@pytest.mark.parametrize("net", [SaysLen, ClassToken])
def test_a_forward_that_says_len_takes_any_number_of_images(net: type[nn.Module]) -> None:
    torch.manual_seed(0)
    made = qtrain.quantize(net(), images(), weight_bits=8, input_bits=8)
    file = export(made, SIZE).to_bytes()
    session = ort.InferenceSession(file)
    assert session.get_inputs()[0].shape[0] == "batch"
    for number in (1, 3, 16):
        (logits,) = session.run(None, {"images": images(number).numpy()})
        assert np.abs(logits - made(images(number)).detach().numpy()).max() < 0.05
    assert verify(made, [images()], SIZE, file).passed


def test_a_number_of_images_that_is_fixed_is_said_and_not_written() -> None:
    made = qtrain.quantize(FixesNumber(), images())
    with pytest.raises(ValueError, match=r"FixesNumber cannot be exported for any number .* images\.shape\[0\]"):
        export(made, SIZE)
    file = export(made, SIZE, batch=1).to_bytes()
    assert ort.InferenceSession(file).get_inputs()[0].shape[0] == 1


def test_a_branch_by_the_images_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    made = qtrain.quantize(Branches(), images())
    capfd.readouterr()
    with pytest.raises(ValueError, match=r"Branches cannot be exported by torch: .*data-dependent.*; torch\.where"):
        export(made, SIZE)
    assert capfd.readouterr().err == "", "torch prints the graphs as far as it came"
