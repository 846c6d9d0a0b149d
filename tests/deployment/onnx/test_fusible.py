"""Rewritten nodes give the same numbers, in a form that the runtime merges."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from qtrain.deployment.onnx.fusible import make_fusible_


def model_of(nodes: list[ir.Node], x: ir.Value, outputs: list[ir.Value], constants: dict[str, np.ndarray]) -> ir.Model:
    values = []
    for name, array in constants.items():
        found = next(v for node in nodes for v in node.inputs if v is not None and v.name == name)
        found.const_value = ir.tensor(array, name=name)
        found.shape, found.type = ir.Shape(array.shape), ir.TensorType(found.const_value.dtype)
        values.append(found)
    graph = ir.Graph([x], outputs, nodes=nodes, initializers=values, opset_imports={"": 21}, name="tested")
    return ir.Model(graph, ir_version=10)


def images(*shape: int) -> ir.Value:
    return ir.Value(name="x", shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))


def run(model: ir.Model, x: np.ndarray) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    data = ir.to_proto(model).SerializeToString()
    found: list[np.ndarray] = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"]).run(
        None, {"x": x}
    )
    return found


def output(node: ir.Node, dtype: ir.DataType, *shape: int) -> ir.Value:
    node.outputs[0].name = f"{node.op_type}_out"
    node.outputs[0].type, node.outputs[0].shape = ir.TensorType(dtype), ir.Shape(shape)
    return node.outputs[0]


def clipped_codes(low: float, high: float, scale: float, zero: int, *, held: tuple[int, int] | None) -> ir.Model:
    """Clip, QuantizeLinear, and a clip of the codes to ``held`` behind it."""
    x = images(2, 8)
    clip = ir.node("Clip", [x, ir.Value(name="low"), ir.Value(name="high")])
    quantize = ir.node(
        "QuantizeLinear", [output(clip, ir.DataType.FLOAT, 2, 8), ir.Value(name="s"), ir.Value(name="z")]
    )
    constants = {
        "low": np.float32(low), "high": np.float32(high), "s": np.float32(scale), "z": np.uint8(zero)
    }  # fmt: skip
    nodes, made = [clip, quantize], output(quantize, ir.DataType.UINT8, 2, 8)
    if held is not None:
        constants |= {"least": np.uint8(held[0]), "most": np.uint8(held[1])}
        nodes.append(ir.node("Clip", [made, ir.Value(name="least"), ir.Value(name="most")]))
        made.name, made = "codes", nodes[-1].outputs[0]
        made.name, made.type, made.shape = "held", ir.TensorType(ir.DataType.UINT8), ir.Shape((2, 8))
    return model_of(nodes, x, [made], {name: np.asarray(value) for name, value in constants.items()})


@pytest.mark.parametrize(
    ("low", "high", "scale", "zero", "held", "left"),
    [
        (0.0, 6.0, 0.02, 0, None, []),  # codes end at 5.1
        (0.0, 6.0, 0.04, 0, None, ["Clip"]),  # and here at 10.2
        (0.0, 6.0, 0.02, 100, None, ["Clip"]),  # negative codes
        (0.0, 6.0, 0.5, 0, (0, 15), ["Clip", "Clip"]),
        (0.0, 6.0, 0.4, 0, (0, 15), ["Clip"]),  # 15 codes are 6 exactly
        (-1.0, 1.0, 0.01, 128, None, ["Clip"]),
    ],
)
def test_bounds_before_codes_become_bounds_of_codes_where_they_narrow_them(
    low: float, high: float, scale: float, zero: int, held: tuple[int, int] | None, left: list[str]
) -> None:
    x = np.random.default_rng(0).normal(0, 6, (2, 8)).astype(np.float32)
    expected = run(clipped_codes(low, high, scale, zero, held=held), x)
    model = clipped_codes(low, high, scale, zero, held=held)
    make_fusible_(model.graph)
    assert model.graph[0].op_type == "QuantizeLinear"
    assert [node.op_type for node in model.graph][1:] == left
    np.testing.assert_array_equal(run(model, x), expected)


def test_bounds_that_another_node_reads_too_stay() -> None:
    model = clipped_codes(0.0, 6.0, 0.02, 0, held=None)
    bounded = model.graph[0].outputs[0]
    model.graph.outputs.append(bounded)
    make_fusible_(model.graph)
    assert [node.op_type for node in model.graph] == ["Clip", "QuantizeLinear"]


@pytest.mark.parametrize("zero", [0, 7])
def test_a_relu_stays_unless_the_codes_reach_below_zero(zero: int) -> None:
    x = images(2, 8)
    relu = ir.node("Relu", [x])
    quantize = ir.node(
        "QuantizeLinear", [output(relu, ir.DataType.FLOAT, 2, 8), ir.Value(name="s"), ir.Value(name="z")]
    )
    made = output(quantize, ir.DataType.UINT8, 2, 8)
    model = model_of([relu, quantize], x, [made], {"s": np.array(0.1, np.float32), "z": np.array(zero, np.uint8)})
    values = np.random.default_rng(0).normal(0, 6, (2, 8)).astype(np.float32)
    expected = run(model, values)
    make_fusible_(model.graph)
    assert [node.op_type for node in model.graph] == (
        ["QuantizeLinear", "Clip"] if zero else ["Relu", "QuantizeLinear"]
    )
    np.testing.assert_array_equal(run(model, values), expected)


@pytest.mark.parametrize(
    ("axes", "keepdims", "shape", "operators"),
    [
        ([2, 3], 1, (2, 3, 1, 1), ["GlobalAveragePool"]),
        ([-1, -2], 0, (2, 3), ["GlobalAveragePool", "Reshape"]),
        ([1], 0, (2, 4, 5), ["ReduceMean"]),
        ([2], 1, (2, 3, 1, 5), ["ReduceMean"]),
    ],
)
def test_a_mean_over_an_image_is_a_global_pool(
    axes: list[int], keepdims: int, shape: tuple[int, ...], operators: list[str]
) -> None:
    x = images(2, 3, 4, 5)
    mean = ir.node("ReduceMean", [x, ir.Value(name="axes")], {"keepdims": keepdims})
    model = model_of([mean], x, [output(mean, ir.DataType.FLOAT, *shape)], {"axes": np.array(axes)})
    values = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
    expected = run(model, values)
    make_fusible_(model.graph)
    assert [node.op_type for node in model.graph] == operators
    (found,) = run(model, values)
    assert found.shape == shape
    np.testing.assert_allclose(found, expected[0], rtol=1e-5, atol=1e-6)
