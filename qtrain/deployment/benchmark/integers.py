"""How much of a network ONNX Runtime computes in integers, counted in the graph that it makes of a file."""

import math
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

_MOVES = (
    "BitShift", "Cast", "Constant", "ConstantOfShape", "DepthToSpace", "DequantizeLinear",
    "Expand", "Flatten", "Gather", "Identity", "Pad", "QuantizeLinear", "Range", "Reshape", "Shape", "Slice", "Split",
    "Squeeze", "Tile", "Transpose", "Unsqueeze",
)  # fmt: skip
"""Operators that move, convert or count numbers. They are no layers."""

_KEEPS_CODES = ("Clip", "Concat", "MaxPool", "Resize")
"""Operators that compute on codes as on numbers in floating point. Whether they do depends on their input."""

_WEIGHT = {"QLinearConv": 3, "QGemm": 3, "QLinearMatMul": 3}
"""The place of the weight among the inputs, where it is not the second."""


@dataclass(frozen=True)
class RuntimeLayer:
    """One node of the runtime's graph that computes; ``macs`` are its multiplications for one image."""

    name: str
    operator: str
    integer: bool
    macs: int


@dataclass(frozen=True)
class InIntegers:
    """What the runtime computes in integers, and what in floating point."""

    layers: tuple[RuntimeLayer, ...]

    @property
    def share(self) -> float:
        """The share of layers in integers, 0 to 1."""
        return sum(layer.integer for layer in self.layers) / max(1, len(self.layers))

    @property
    def macs_share(self) -> float:
        """The share of multiplications in integers, 0 to 1."""
        return sum(layer.macs for layer in self.layers if layer.integer) / max(1, sum(one.macs for one in self.layers))

    def operators(self, *, integer: bool) -> dict[str, int]:
        """How often each operator occurs, most frequent first: of those in integers, or of the others."""
        return dict(Counter(layer.operator for layer in self.layers if layer.integer == integer).most_common())

    def __str__(self) -> str:
        left = ", ".join(f"{count} {name}" for name, count in self.operators(integer=False).items())
        count = sum(layer.integer for layer in self.layers)
        said = f"{count} of {len(self.layers)} layers in integers, {100 * self.macs_share:.1f} % of multiplications"
        return f"{said}; in floating point: {left}" if left else said


def in_integers(model: bytes, size: Sequence[int]) -> InIntegers:
    """What ONNX Runtime computes in integers of the file ``model`` for images of ``size`` (C, H, W).

    The runtime fuses quantize and dequantize nodes with what is between them. Its own graph, before it chooses memory
    formats, shows what came of that. Layers are products, sums, pools, activations and the like, each node one.
    """
    graph = _optimized(model)
    shapes = _shapes(graph, size)
    codes = {tensor.name: tensor.data_type != onnx.TensorProto.FLOAT for tensor in graph.graph.initializer}
    layers = []
    for node in graph.graph.node:
        given = bool(node.input) and codes.get(node.input[0], False)
        integer = _in_integers(node, given)
        for output in node.output:
            codes[output] = _gives_codes(node, given)
        if node.op_type in _MOVES or (node.op_type == "Clip" and integer):
            continue
        layers.append(RuntimeLayer(node.name, node.op_type, integer, _macs(node, shapes)))
    return InIntegers(tuple(layers))


def _in_integers(node: onnx.NodeProto, given: bool) -> bool:
    name = node.op_type
    if name.startswith(("QLinear", "MatMulInteger")) or name.endswith("Integer"):
        return True
    if name in ("QGemm", "DynamicQuantizeMatMul"):
        return True
    return given and name in _KEEPS_CODES


def _gives_codes(node: onnx.NodeProto, given: bool) -> bool:
    name = node.op_type
    if name == "QGemm":  # without a scale of its output the latter is in floating point
        return len(node.input) > 7
    if name == "QuantizeLinear" or name.startswith("QLinear"):
        return True
    return given and name in (*_MOVES, *_KEEPS_CODES) and name not in ("DequantizeLinear", "Cast", "Shape")


def _optimized(model: bytes) -> onnx.ModelProto:
    """The graph that the runtime makes of ``model``, with all its fusions."""
    options = _options()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        return onnx.load(options.optimized_model_filepath)


def _options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return options


def _is_product(node: onnx.NodeProto) -> bool:
    return any(word in node.op_type for word in ("Conv", "Gemm", "MatMul"))


def _shapes(model: onnx.ModelProto, size: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """The shapes of all that the products of ``model`` read and give, for one image, from a run."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    (images,) = model.graph.input
    products = [node for node in model.graph.node if _is_product(node)]
    seen = {name for node in products for name in (*node.input, *node.output) if name}
    wanted = sorted(seen - shapes.keys() - {images.name})
    traced = onnx.ModelProto()
    traced.CopyFrom(model)
    del traced.graph.output[:]
    traced.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in wanted)
    options = _options()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(traced.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = session.run(wanted, {images.name: np.zeros((1, *size), dtype=np.float32)}) if wanted else []
    shapes[images.name] = (1, *size)
    return shapes | {name: array.shape for name, array in zip(wanted, found, strict=True)}


def _macs(node: onnx.NodeProto, shapes: dict[str, tuple[int, ...]]) -> int:
    if not _is_product(node):
        return 0
    given, made = shapes[node.input[0]], shapes[node.output[0]]
    weight = shapes[node.input[_WEIGHT.get(node.op_type, 1)]]
    if "ConvTranspose" in node.op_type:
        return math.prod(given) * math.prod(weight[1:])
    if "Conv" in node.op_type:
        return math.prod(made) * math.prod(weight[1:])
    return math.prod(made) * given[-1]
