"""A file is read or refused in one line, and every change of it is named."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

import qtrain
from qtrain.deployment.onnx.write import export
from qtrain.deployment.parity.file import batch_of, changed, read
from tests.deployment.onnx.networks import network
from tests.deployment.onnx.test_write import FAST, SIZE, images


@pytest.fixture(scope="module")
def made() -> nn.Module:
    torch.manual_seed(0)
    return qtrain.quantize(network("residual").eval(), images(), weight_bits=4, input_bits=4, options=FAST)


@pytest.fixture(scope="module")
def file(made: nn.Module) -> bytes:
    return export(made, SIZE).to_bytes()


def node_of(model: onnx.ModelProto, kind: str, *, after: int = 0) -> onnx.NodeProto:
    return [node for node in model.graph.node if node.op_type == kind][after]


def before(model: onnx.ModelProto, node: onnx.NodeProto, kind: str, *constants: float, **attributes: float) -> str:
    """Put an operation before ``node``; its name."""
    name = f"{node.name}.{kind}"
    for place, number in enumerate(constants):
        tensor = numpy_helper.from_array(np.float32(number), f"{name}.{place}")
        model.graph.initializer.append(tensor)
    names = [node.input[0], *(f"{name}.{place}" for place in range(len(constants)))]
    added = helper.make_node(kind, names, [name], name=name, **attributes)
    place = next(i for i, other in enumerate(model.graph.node) if other.name == node.name)
    node.input[0] = name
    model.graph.node.insert(place, added)
    return node.name


def rounding_down(model: onnx.ModelProto) -> str:
    return before(model, node_of(model, "QuantizeLinear", after=1), "Floor")


def an_offset(model: onnx.ModelProto) -> str:
    return before(model, node_of(model, "QuantizeLinear", after=1), "Add", 0.01)


def a_clip(model: onnx.ModelProto) -> str:
    return before(model, node_of(model, "QuantizeLinear", after=1), "Clip", 0.0, 0.9)


def a_swapped_weight(model: onnx.ModelProto) -> str:
    first, second = (
        next(node for node in model.graph.node if node.name == f"body.{layer}.weight.DequantizeLinear")
        for layer in ("conv1", "conv2")
    )
    first.input[0], second.input[0] = second.input[0], first.input[0]
    return first.name


def a_swapped_operand(model: onnx.ModelProto) -> str:
    node = node_of(model, "Add")
    node.input[0] = node.input[1]
    return node.name


def a_removed_relu(model: onnx.ModelProto) -> str:
    node = node_of(model, "Relu")
    for other in model.graph.node:
        for place, name in enumerate(other.input):
            if name == node.output[0]:
                other.input[place] = node.input[0]
    name = node.name
    model.graph.node.remove(node)
    return name


def another_padding(model: onnx.ModelProto) -> str:
    node = node_of(model, "Conv", after=1)
    pads = next(a for a in node.attribute if a.name == "pads")
    pads.ints[:] = [2, 2, 0, 0]
    return node.name


def another_shift(model: onnx.ModelProto) -> str:
    node = node_of(model, "BitShift")
    next(a for a in node.attribute if a.name == "direction").s = b"RIGHT"
    return node.name


def other_logits(model: onnx.ModelProto) -> str:
    model.graph.output[0].name = model.graph.input[0].name
    return "outputs"


@pytest.mark.parametrize(
    "mutate",
    [rounding_down, an_offset, a_clip, a_swapped_weight, a_swapped_operand, a_removed_relu, another_padding,
     another_shift, other_logits],
)  # fmt: skip
def test_a_changed_operation_is_named(file: bytes, mutate: Callable[[onnx.ModelProto], str]) -> None:
    model = onnx.load_from_string(file)
    name = mutate(model)
    faults = changed(read(file), read(model.SerializeToString()))
    assert any(fault.startswith(f"{name}: the file ") for fault in faults), faults


def test_the_file_itself_is_not_changed(file: bytes) -> None:
    assert changed(read(file), read(file)) == []


def test_an_operator_that_the_file_defines_itself_is_named(file: bytes) -> None:
    model = onnx.load_from_string(file)
    body = [helper.make_node("Abs", ["x"], ["y"])]
    own = helper.make_function("own", "Odd", ["x"], ["y"], body, [helper.make_opsetid("", 21)])
    model.functions.append(own)
    model.opset_import.append(helper.make_opsetid("own", 1))
    assert changed(read(file), read(model.SerializeToString())) == ["Odd: the file defines this operator itself"]


def test_each_constant_of_a_network_with_depthwise_layers_norms_and_sums_is_named_when_it_changes_least(
    with_norms: tuple[nn.Module, bytes],
) -> None:
    """One code of a weight, one zero point, one bias, and the last bit of one scale or parameter of a norm."""
    data = with_norms[1]
    ours, described = read(data), onnx.load_from_string(data)
    names = [tensor.name for tensor in described.graph.initializer]
    for part in (
        "depthwise.weight.codes", "depthwise.weight.scale", "depthwise.weight.DequantizeLinear.zero_point",
        "depthwise.bias.codes", "behind.weight", "norm.weight",
    ):  # fmt: skip
        assert f"body.{part}" in names, names
    assert any(name.startswith("body.concat_0.") and name.endswith(".scale") for name in names), names
    for place, name in enumerate(names):
        mutated = onnx.ModelProto()
        mutated.CopyFrom(described)
        values = numpy_helper.to_array(described.graph.initializer[place]).copy()
        first = values.reshape(-1)[:1]
        whole = np.issubdtype(values.dtype, np.integer)
        first[:] = first ^ 1 if whole else np.nextafter(first, np.float32(np.inf))
        mutated.graph.initializer[place].CopyFrom(numpy_helper.from_array(values, name))
        (fault,) = changed(ours, read(mutated.SerializeToString()))
        assert fault.startswith(f"{name}: ") and fault.endswith(" of its bytes are not the student's")


@pytest.mark.parametrize("data", [b"", b"no model", b"\x08\x0a\x12", bytes(500)])
def test_a_file_that_is_no_model_ends_in_one_line(data: bytes) -> None:
    with pytest.raises(ValueError, match="the file is damaged or no ONNX model") as caught:
        read(data)
    assert str(caught.value).isprintable()


def test_a_truncated_file_ends_in_one_line(file: bytes) -> None:
    for length in range(0, len(file), len(file) // 23):
        with pytest.raises(ValueError, match="export it anew") as caught:
            read(file[:length])
        assert str(caught.value).isprintable()


def test_a_file_with_a_wrong_byte_is_refused_in_one_line_or_named_or_computes_the_same(file: bytes) -> None:
    ours, named, refused = read(file), 0, 0
    places = torch.randint(len(file), (300,), generator=torch.Generator().manual_seed(0)).tolist()
    for place in places:
        data = bytearray(file)
        data[place] ^= 0x41
        try:
            faults = changed(ours, read(bytes(data)))
        except ValueError as error:
            assert str(error).isprintable()
            refused += 1
        else:
            assert all(fault.isprintable() for fault in faults)
            named += bool(faults)
    assert named > 50 and refused > 50


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda model: setattr(model.opset_import[0], "version", 999), r"the file has opset 999, onnx .* knows \d+; "),
        (lambda model: setattr(model, "ir_version", 999), r"the file has version 999 of ONNX, onnx .* knows \d+; "),
        (lambda model: set_format(model, "2"), r"version 2 of qtrain's exports, this qtrain reads 1; update qtrain"),
        (lambda model: set_format(model, "two"), r"the file is damaged"),
    ],
)
def test_a_newer_file_says_what_to_update(file: bytes, change: Callable[[onnx.ModelProto], None], said: str) -> None:
    model = onnx.load_from_string(file)
    change(model)
    with pytest.raises(ValueError, match=said) as caught:
        read(model.SerializeToString())
    assert str(caught.value).isprintable()


def set_format(model: onnx.ModelProto, value: str) -> None:
    next(entry for entry in model.metadata_props if entry.key == "qtrain.format").value = value


def test_the_batch_is_read_from_the_file(made: nn.Module, file: bytes) -> None:
    assert batch_of(read(file)) is None
    assert batch_of(read(export(made, SIZE, batch=3).to_bytes())) == 3
