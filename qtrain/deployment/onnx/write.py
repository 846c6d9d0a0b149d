"""The lowered student as an ONNX model: traced by torch, named and completed by onnx-ir."""

import ast
import io
import itertools
import json
import logging
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from qtrain.deployment.onnx import pack
from qtrain.deployment.onnx.fusible import make_fusible_
from qtrain.deployment.onnx.lowering import Lowering, lower
from qtrain.deployment.onnx.symbolic import OPSET
from qtrain.models.lengths import open_lengths
from qtrain.models.trial import placed, tensor_of
from qtrain.utils.errors import one_line

IMAGES, LOGITS = "images", "logits"
"""The names of the file's input (N, C, H, W) float32, as the network takes it, and of its output."""

OLDEST = 18
"""Of ONNX's opsets that torch exports to."""

FORMAT_KEY, FORMAT = "qtrain.format", 1
"""Key and value of the file's metadata that say how it is laid out: a later qtrain may lay files out differently."""

EXPORTERS = ("onnx_ir", "onnxscript", "torch.onnx", "torch.export", "torch.fx.experimental.symbolic_shapes")
"""Loggers of those who take part in an export."""

DATA_DEPENDENT = "data-dependent"
"""What torch's errors say of a forward that goes other ways for other images."""

SCOPES = "pkg.torch.onnx.name_scopes"
"""Where the exporter notes the modules that a node comes from."""


@dataclass(frozen=True)
class Exported:
    """An ONNX model, and what it was made of.

    In ``model`` the biases have 32 bits and the scale of the sums that they are added to, as runtimes want them; in
    ``exact`` they are in floating point. ``codes`` names the value with the codes of each layer's input, by
    :func:`call_of` the layer.
    """

    model: ir.Model
    exact: ir.Model
    lowering: Lowering
    codes: dict[str, str]

    def to_bytes(self) -> bytes:
        """The file: equal students give equal bytes."""
        data: bytes = ir.to_proto(self.model).SerializeToString(deterministic=True)
        return data


def export(
    student: nn.Module,
    size: tuple[int, ...],
    *,
    opset: int = OPSET,
    batch: int | None = None,
    packed: bool = False,
    metadata: Mapping[str, object] | None = None,
) -> Exported:
    """``student`` as an ONNX model for ``batch`` images of ``size`` (C, H, W), or for any number of them.

    With ``packed``, weights of at most 4 bits take half a byte each in the file.

    Raises ``ValueError`` in one line where an input has no form in ONNX, torch cannot export the network, or ``opset``
    is older than 18, or than 21 with ``packed``.
    """
    if packed and opset < pack.OPSET:
        raise ValueError(f"weights: 4-bit codes need opset {pack.OPSET}, got {opset}; take weights=bytes")
    if opset < OLDEST:
        raise ValueError(f"opset: must be {OLDEST} or newer, got {opset}")
    if batch is not None and batch < 1:
        raise ValueError(f"batch: must be at least 1, or null for any number of images, got {batch}")
    tensor_of(student, placed(torch.zeros(batch or 2, *size), student), where="export")
    lowering = lower(student)
    exact = _traced(lowering.model, size, opset=opset, batch=batch, owner=type(student).__name__)
    make_fusible_(exact.graph)
    codes = {node: _layer_of(node, lowering) for node in exact.graph if node.op_type == "DequantizeLinear"}
    shared = _share_codes(exact.graph)
    _name(exact.graph)
    named: dict[str, str] = {}
    for node, layer in codes.items():
        if layer is not None:
            clipped = lowering.gates.get(layer.removesuffix(".input"), False)
            named[call_of(layer, named)] = str(_codes(shared.get(node, node), clipped=clipped).name)
    layers = {str(node.name): module_of(node) for node in exact.graph}
    _forget(exact)
    for key, value in {FORMAT_KEY: FORMAT, **(metadata or {})}.items():
        exact.metadata_props[key] = value if isinstance(value, str) else json.dumps(value)
    exact.producer_name, exact.producer_version = "qtrain", ""
    model = exact.clone()
    _code_biases(model.graph, lowering, layers)
    for made in (exact, model):
        _own_zero_points(made.graph)
    if packed:
        pack.pack_(model.graph)
    return Exported(model, exact, lowering, named)


def _traced(model: nn.Module, size: tuple[int, ...], *, opset: int, batch: int | None, owner: str) -> ir.Model:
    """``model`` as torch's exporter writes it, for ``batch`` images or, where that is ``None``, for any number."""
    example = torch.zeros(batch or 2, *size)
    try:
        with _quiet(), open_lengths(model):
            program = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                verbose=False,
                opset_version=opset,
                input_names=[IMAGES],
                output_names=[LOGITS],
                dynamic_shapes=({0: torch.export.Dim("batch")},) if batch is None else None,
            )
    except Exception as error:  # whatever a forward does that torch cannot trace
        reason = one_line(error.__cause__ or error)
        hint = "; torch.where, which computes both ways, takes the place of an if" if DATA_DEPENDENT in reason else ""
        raise ValueError(f"{owner} cannot be exported by torch: {reason}{hint}") from error
    assert program is not None
    if (newest := program.model.opset_imports[""]) != opset:
        raise ValueError(f"opset: torch writes {newest} where {opset} is asked for; take {newest}")
    if batch is None and not _takes_any_number(program.model):
        raise ValueError(
            f"{owner} cannot be exported for any number of images: its forward makes a constant of their number; take "
            "it from images.shape[0] there, or flatten from dimension 1; or export for a fixed number, as batch=1"
        )
    return program.model


def _takes_any_number(model: ir.Model) -> bool:
    ends = [*model.graph.inputs, *model.graph.outputs]
    return all(end.shape is not None and not isinstance(end.shape[0], int) for end in ends)


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, the exporter's warnings, its notes on each node and the graphs that it prints are not shown."""
    loggers = [logging.getLogger(name) for name in EXPORTERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def call_of(layer: str, calls: Collection[str]) -> str:
    """The name of the next call of ``layer`` after ``calls``: its own, then with ``#2`` behind it, and so on."""
    names = (layer if number == 1 else f"{layer}#{number}" for number in itertools.count(1))
    return next(name for name in names if name not in calls)


def layer_of(call: str) -> str:
    """The layer of a name that :func:`call_of` gives."""
    return call.split("#")[0]


def module_of(node: ir.Node) -> str:
    """The qualified name of the layer that ``node`` comes from."""
    scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
    return str(scopes[-2]) if len(scopes) > 1 else ""


def _layer_of(node: ir.Node, lowering: Lowering) -> str | None:
    """The layer whose input ``node`` dequantizes, or ``None`` where it is a weight or a bias."""
    scope = module_of(node)
    layer = scope if scope in lowering.inputs else scope.removesuffix(".input")
    if scope in lowering.gates:
        layer = f"{scope}.input"
    coded = node.inputs[0] is not None and not node.inputs[0].is_initializer()
    return layer if coded and layer in lowering.inputs else None


def _codes(node: ir.Node, *, clipped: bool = False) -> ir.Value:
    """The codes that ``node`` dequantizes, before they are shifted; if ``clipped``, before a gate clips them."""
    (value, *_) = node.inputs
    assert value is not None
    shift = value.producer()
    if shift is not None and shift.op_type == ("Clip" if clipped else "BitShift"):
        (value, *_) = shift.inputs
        assert value is not None
    return value


def _share_codes(graph: ir.Graph) -> dict[ir.Node, ir.Node]:
    """Let layers that quantize one tensor by equal numbers read the same codes; what stands for each removed node."""
    seen: dict[tuple[object, ...], ir.Node] = {}
    replaced: dict[ir.Node, ir.Node] = {}
    for node in list(graph):
        if node.op_type not in ("QuantizeLinear", "Clip", "BitShift", "DequantizeLinear"):
            continue
        key = (node.op_type, *(_content(value) for value in node.inputs), str(dict(node.attributes)))
        first = seen.setdefault(key, node)
        if first is not node:
            ir.convenience.replace_all_uses_with(node.outputs[0], first.outputs[0])
            graph.remove(node, safe=True)
            replaced[node] = first
    return replaced


def _content(value: ir.Value | None) -> object:
    """What tells two values apart: for constants, their content."""
    if value is None or value.const_value is None:
        return value
    array = value.const_value.numpy()
    return array.dtype.str, array.shape, array.tobytes()


def _name(graph: ir.Graph) -> None:
    """Name nodes and the codes between them after the layers."""
    taken: dict[str, int] = {}
    for node in graph:
        scope = module_of(node) or "network"
        name = f"{scope}.{node.op_type}"
        number = taken[name] = taken.get(name, -1) + 1
        node.name = f"{name}.{number}" if number else name
        if len(node.outputs) == 1 and not node.outputs[0].is_graph_output():
            node.outputs[0].name = node.name


def _code_biases(graph: ir.Graph, lowering: Lowering, layers: Mapping[str, str]) -> None:
    """Put the layers' biases in 32 bits in the place of those in floating point; ``layers`` by the name of a node."""
    for node in list(graph):
        layer = layers.get(str(node.name), "")
        bias = lowering.biases.get(layer)
        for place, value in enumerate(node.inputs):
            if bias is None or value is None or value.const_value is None or value.dtype != ir.DataType.FLOAT:
                continue
            if tuple(value.const_value.shape) != tuple(bias.codes.shape) or node.op_type == "DequantizeLinear":
                continue
            zero = torch.zeros_like(bias.codes)
            parts = [("codes", bias.codes), ("scale", bias.scale), ("zero_point", zero)]
            inputs = [_constant(graph, f"{layer}.bias.{part}", tensor.numpy()) for part, tensor in parts]
            coded = ir.node("DequantizeLinear", inputs, {"axis": 0}, name=f"{node.name}.bias")
            coded.outputs[0].name = coded.name
            coded.outputs[0].shape, coded.outputs[0].type = value.shape, value.type
            graph.insert_before(node, coded)
            node.replace_input_with(place, coded.outputs[0])


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """The constant ``name`` of ``graph``, which is made where it is not there yet."""
    if name in graph.initializers:
        return graph.initializers[name]
    tensor = ir.tensor(array.copy(), name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _own_zero_points(graph: ir.Graph) -> None:
    """Give each constant a zero point of its own: a runtime rewrites them, and fails where several share one."""
    for node in graph:
        coded, zero = (*node.inputs, None, None, None)[:3:2]
        if node.op_type != "DequantizeLinear" or coded is None or zero is None or not coded.is_initializer():
            continue
        assert zero.const_value is not None
        own = _constant(graph, f"{node.name}.zero_point", zero.const_value.numpy())
        node.replace_input_with(2, own)
    for used, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[used]


def _forget(model: ir.Model) -> None:
    """Remove what only debugging reads, paths of the machine among it."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
