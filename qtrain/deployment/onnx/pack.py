"""Weights of at most 4 bits as the file stores them in half a byte each.

A cast, and a product where the codes are larger by a power of two, make bytes of them again. Runtimes compute such
constants when they load the file, and then fuse layers as if it had bytes.
"""

import numpy as np
import onnx_ir as ir

OPSET = 21
"""The first with 4-bit codes."""

HALF_BYTES = (ir.DataType.INT4, ir.DataType.UINT4)


def pack_(graph: ir.Graph) -> None:
    """Let the weights of ``graph`` that have no more than 16 codes take 4 bits each."""
    made: dict[str, ir.Value] = {}
    for node in list(graph):
        if node.op_type != "DequantizeLinear" or (codes := node.inputs[0]) is None or codes.const_value is None:
            continue
        name, array = str(codes.name), codes.const_value.numpy()
        if name not in made:
            factor, small = _without_factor(array)
            kind = _half_byte(small) if array.dtype in (np.int8, np.uint8) else None
            if kind is None:
                continue
            made[name] = _unpacked(graph, node, codes, small.astype(kind.numpy()), factor)
        node.replace_input_with(0, made[name])


def is_packed(model: ir.Model) -> bool:
    """Whether :func:`pack_` has changed ``model``."""
    return any(value.dtype in HALF_BYTES for value in model.graph.initializers.values())


def _without_factor(array: np.ndarray) -> tuple[int, np.ndarray]:
    """The largest power of two that divides all of ``array``, and what is left."""
    common = int(np.gcd.reduce(array.astype(np.int64), axis=None))
    factor = max(1, common & -common)
    return factor, array.astype(np.int64) // factor


def _half_byte(array: np.ndarray) -> ir.DataType | None:
    """The type of 4 bits that holds ``array``."""
    low, high = int(array.min(initial=0)), int(array.max(initial=0))
    if low >= -8 and high <= 7:
        return ir.DataType.INT4
    return ir.DataType.UINT4 if low >= 0 and high <= 15 else None


def _unpacked(graph: ir.Graph, node: ir.Node, codes: ir.Value, small: np.ndarray, factor: int) -> ir.Value:
    """The bytes of ``codes`` computed, before ``node``, from ``small`` under the same name."""
    assert codes.dtype is not None
    name, shape = str(codes.name), ir.Shape(small.shape)
    tensor = ir.tensor(small, name=name)
    del graph.initializers[name]
    stored = ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(stored)
    steps: list[tuple[str, list[ir.Value], ir.DataType]] = [("Cast", [], codes.dtype)]
    if factor > 1:  # products of bytes are not among what runtimes have
        times = ir.tensor(np.array(factor, dtype=np.int32), name=f"{name}.factor")
        value = ir.Value(name=times.name, shape=ir.Shape(()), type=ir.TensorType(times.dtype), const_value=times)
        graph.register_initializer(value)
        steps = [("Cast", [], ir.DataType.INT32), ("Mul", [value], ir.DataType.INT32), *steps]
    last = stored
    for number, (kind, more, dtype) in enumerate(steps):
        attributes = {"to": int(dtype)} if kind == "Cast" else {}
        made = ir.node(kind, [last, *more], attributes, name=f"{name}.{kind}.{number}")
        (last,) = made.outputs
        last.name, last.shape, last.type = made.name, shape, ir.TensorType(dtype)
        graph.insert_before(node, made)
    return last
