"""A student for a runtime: which operations are quantized, and each tensor once."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qtrain
from qtrain.config.compose import compose
from qtrain.convert.calibrate import calibrate
from qtrain.convert.layers import quant_layers, quantizers_of, set_quantization
from qtrain.convert.operations import expose_operations
from qtrain.convert.switch import switch_bits_
from qtrain.convert.target import Target
from qtrain.convert.tensors import readings
from qtrain.costs.count import count
from qtrain.nn.operations import Add, Operation
from qtrain.pipeline.conversion import convert
from qtrain.ptq.calibrate_from_bn import calibrate_from_statistics
from qtrain.spec import FULL_PRECISION, LayerBits


class Net(nn.Module):
    """Operations in the network's own forward, as functions, methods and modules, and numbers that look like some."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.act, self.pool = nn.Hardswish(), nn.MaxPool2d(2)
        self.reduce = nn.Conv2d(8, 8, 1)
        self.scale = nn.Parameter(torch.ones(8, 1, 1))
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.norm1(self.conv1(x))))
        y = self.act(self.conv2(x) * self.scale) + x
        z = y * torch.sigmoid(self.reduce(y.mean((2, 3), keepdim=True)))
        z = F.max_pool2d(torch.cat([z, y], dim=1), 2)
        batch, channels, height, width = z.shape
        z = z.reshape(batch, channels, height * width).mean(2)
        return self.fc(z + 0.5)


KINDS = {"max_pool", "add", "activation", "multiply", "average_pool", "concat"}


def net() -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    return Net().eval(), torch.randn(4, 3, 8, 8)


class Block(nn.Module):
    """A residual block whose shortcut is a layer too, where ``stride`` is 2."""

    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, stride, 1), nn.Conv2d(8, 8, 3, 1, 1)
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(8, 8, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.shortcut(x))


def residual() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    return nn.Sequential(*stem, Block(), Block(2), *head).eval(), torch.randn(4, 3, 16, 16)


def test_operations_of_the_network_itself_become_modules_bit_for_bit() -> None:
    model, x = net()
    original = copy.deepcopy(model)
    exposed = expose_operations(model, KINDS, x)
    kinds = {module.kind for module in model.modules() if isinstance(module, Operation)}
    assert kinds == KINDS
    assert len(exposed) == 8, "pool, hard swish, sum, mean, sigmoid, gate, concatenation, pool; no product of sizes"
    with torch.no_grad():
        assert torch.equal(model(x), original(x))
        assert torch.equal(copy.deepcopy(model)(x), original(x))
    assert isinstance(model, Net)
    assert expose_operations(model, KINDS, x) == [], "there is nothing left to expose"
    assert model.state_dict().keys() == original.state_dict().keys()


def test_a_copy_computes_with_its_own_weights() -> None:
    model, x = net()
    expose_operations(model, KINDS, x)
    other = copy.deepcopy(model)
    with torch.no_grad():
        before = model(x)
        other.fc.weight.zero_()
        assert torch.equal(model(x), before) and not torch.equal(other(x), before)


def test_layers_that_read_one_tensor_are_found() -> None:
    model, x = residual()
    student = qtrain.quantize(model, x, operations={"add": 8, "max_pool": 8})
    found = readings(student, x[:1])
    assert ["2.input", "3.conv1", "3.add_0.right"] in found.tensors  # a maximum of codes is one of them
    assert ["4.conv1", "4.shortcut"] in found.tensors
    assert found.main == {"3.add_0.left", "4.add_0.left"}


class Twice(nn.Module):
    """``b`` reads the image, which ``a`` reads too, and what ``a`` gives, which ``c`` reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(3, 3, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.d(self.b(x) + self.b(y) + self.c(y))


def test_a_layer_that_is_called_twice_joins_the_readers_of_both_tensors() -> None:
    x = torch.randn(2, 3, 4, 4)
    student = qtrain.quantize(Twice(), x, weight_observer="min_max", input_observer="min_max")
    assert readings(student, x[:1]).tensors == [["a", "b", "c"], ["d"]]


def test_each_tensor_has_one_quantizer_of_the_most_bits() -> None:
    model, x = residual()
    student = qtrain.quantize(model, x, weight_bits=4, input_bits=4, target="onnxruntime")
    layers = quant_layers(student)
    shared = layers["2.input"].input_quantizer
    assert shared is layers["3.add_0.right"].input_quantizer and int(shared.bits) == 8
    conv = layers["3.conv1"]
    assert conv.tensor_quantizer is shared and int(conv.input_quantizer.bits) == 4
    assert layers["4.conv1"].input_quantizer is layers["4.shortcut"].input_quantizer
    assert layers["4.conv1"].tensor_quantizer is None
    assert layers["0"].tensor_quantizer is None and layers["7"].tensor_quantizer is None


def test_fewer_bits_read_what_more_bits_give() -> None:
    model, x = residual()
    student = qtrain.quantize(model, x, weight_bits=4, input_bits=4, target="onnxruntime")
    conv = student.get_submodule("3.conv1")
    values = torch.rand(2, 8, 4, 4) * 3
    once = conv.tensor_quantizer.quantize(values).dequantize()
    twice = conv.input_quantizer.quantize(once).dequantize()
    weight = conv.weight_quantizer.quantize(conv.weight).dequantize()
    with torch.no_grad():
        expected = F.conv2d(twice, weight, conv.bias, 1, 1)
        assert torch.equal(conv(values), expected)
        conv.tensor_quantizer.enabled = False
        assert not torch.equal(conv(values), expected)


def test_a_shared_quantizer_is_calibrated_on_all_that_reads_it() -> None:
    model, x = residual()
    student = qtrain.quantize(
        model, x, input="affine", input_observer="min_max", weight_bits=8, input_bits=8, target="onnxruntime"
    )
    with torch.no_grad():
        before_the_pool = model[1](model[0](x))
    quantizer = student.get_submodule("2.input").input_quantizer
    assert float(quantizer.quantize(before_the_pool).scale) * 255 == pytest.approx(float(before_the_pool.max()))


def test_the_shortcut_alone_is_quantized_for_runtimes_that_merge_the_sum() -> None:
    model, x = residual()
    for target, left in (("openvino", None), ("tensorrt", None), ("onnxruntime", 8)):
        student = qtrain.quantize(model, x, target=target)
        for add in (module for module in student.modules() if isinstance(module, Add)):
            assert add.right.input_quantizer is not None
            quantizer = add.left.input_quantizer
            assert (None if quantizer is None else int(quantizer.bits)) == left


def test_quantizers_off_give_the_original_bit_for_bit() -> None:
    model, x = net()
    student = copy.deepcopy(model)
    calibrate(student, [x], convert(compose(["target=onnxruntime"]), student, x).plans)
    with torch.no_grad():
        assert not torch.equal(student(x), model(x))
        set_quantization(student, enabled=False)
        assert torch.equal(student(x), model(x))


def test_bits_of_an_operation_win_over_the_target() -> None:
    model, x = residual()
    student = qtrain.quantize(model, x, weight_bits=8, input_bits=8, target="onnxruntime", operations={"add": 16})
    assert int(student.get_submodule("3.add_0.left").input_quantizer.bits) == 16
    assert int(student.get_submodule("2.input").input_quantizer.bits) == 8


def test_a_target_takes_what_there_is() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Flatten()), torch.randn(2, 3, 8, 8)
    assert set(qtrain.describe(qtrain.quantize(model, x, target="onnxruntime")).layers) == {"0", "2"}


def test_shared_quantizers_are_counted_once() -> None:
    model, x = residual()
    student = qtrain.quantize(model, x, weight_bits=8, input_bits=8, target="onnxruntime")
    quantizers = {id(layer.input_quantizer) for layer in quant_layers(student).values() if layer.input_quantizer}
    plain = qtrain.quantize(model, x, weight_bits=8, input_bits=8)
    own = {id(layer.input_quantizer) for layer in quant_layers(plain).values()}
    assert len(quantizers) < sum(layer.input_quantizer is not None for layer in quant_layers(student).values())
    difference = count(student, x).size_bytes - count(plain, x).size_bytes
    assert difference == 4 * (len(quantizers) - len(own)), "a scale for each"


def test_rows_of_layers_have_a_shared_quantizer_once() -> None:
    model, x = residual()
    student = qtrain.quantize(model, x, weight_bits=4, input_bits=4, target="onnxruntime")
    readers = [layer.input_quantizer for layer in quant_layers(student).values() if layer.input_quantizer is not None]
    weighted = {m.input_quantizer for m in quant_layers(student).values() if hasattr(m, "weight")} - {None}
    assert len(set(readers)) < len(readers)
    found = sum(row.input_storage_bits for row in count(student, x[:1]).layers)
    assert found == sum(quantizer.storage_bits() for quantizer in weighted)


def test_a_shared_quantizer_learns_from_every_reader() -> None:
    model, x = residual()
    student = qtrain.quantize(model, x, weight_bits=4, input_bits=4, target="onnxruntime").train()
    student(x).square().mean().backward()
    gradients = {name: p.grad for name, p in student.named_parameters() if name.endswith("scale")}
    assert gradients and all(g is not None and bool(g.abs().sum() > 0) for g in gradients.values())


def test_a_step_for_a_target_compiles_in_one_graph() -> None:
    model, x = residual()
    student = qtrain.quantize(model, x, weight_bits=4, input_bits=4, target="onnxruntime").train()
    torch._dynamo.reset()
    torch.compile(student, backend="aot_eager", fullgraph=True)(x).square().mean().backward()


def test_layers_that_share_a_quantizer_change_their_bits_together() -> None:
    model, x = residual()
    student = qtrain.quantize(model, x, weight_bits=8, input_bits=8, target="onnxruntime")
    with pytest.raises(ValueError, match=r"'4.conv1' has the quantizer of the tensor that it reads in common with"):
        switch_bits_(student, {"4.conv1": LayerBits(8, 4)})
    switch_bits_(student, {"4.conv1": LayerBits(8, 4), "4.shortcut": LayerBits(8, 4)})
    assert int(student.get_submodule("4.shortcut").input_quantizer.bits) == 4


def test_a_target_names_a_kind_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match=r"Target: mine has no kind \['divide'\]; use \['activation'"):
        Target(name="mine", operations={"divide": 8}, sums="both")
    with pytest.raises(ValueError, match=r"sums must be both or shortcut, got 'one'"):
        Target(name="mine", operations={}, sums="one")  # type: ignore[arg-type]


def test_operands_without_bits_stay_in_full_precision() -> None:
    model, x = residual()
    report = qtrain.describe(qtrain.quantize(model, x, target="openvino"))
    assert report.layers["3.add_0.left"] == LayerBits(FULL_PRECISION, FULL_PRECISION)


def test_statistics_calibrate_a_shared_quantizer_by_all_that_reads_it() -> None:
    """A pool reads the tensor, and behind it a layer and a sum do; each of them is observed."""
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
    model = nn.Sequential(*stem, Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()
    nn.init.uniform_(model[1].bias, 1.0, 2.0)
    nn.init.uniform_(model[1].running_mean, -0.2, 0.2)
    settings = compose(["target=onnxruntime", "quantize.fold=before", "quantizer@quantize.input=affine"])
    converted = convert(settings, model, torch.randn(1, 3, 8, 8))
    calibrate_from_statistics(model, converted.plans, converted.statistics, low=-torch.ones(3), high=torch.ones(3))
    pool, conv = model.get_submodule("3.input"), model.get_submodule("4.conv1")
    assert conv.tensor_quantizer is pool.input_quantizer
    assert all(bool(quantizer.initialized) for quantizer in quantizers_of(model).values())
    assert float(pool.input_quantizer.quantize(torch.rand(2, 8, 8, 8)).scale) * 255 > 3, "1.5 and several deviations"
