"""Nodes written as runtimes know them: the same numbers, in a form that they merge with their neighbors."""

import numpy as np
import onnx_ir as ir


def make_fusible_(graph: ir.Graph) -> None:
    """Rewrite averages of images and activations before codes in ``graph``."""
    for node in list(graph):
        if node.op_type == "ReduceMean":
            _as_pool(graph, node)
        elif node.op_type in ("Clip", "Relu"):
            _behind_codes(graph, node)


def _as_pool(graph: ir.Graph, node: ir.Node) -> None:
    """A mean over height and width is a global average pool, which runtimes compute with integers."""
    x, axes = node.inputs[0], _constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if x is None or x.shape is None or len(x.shape) != 4 or axes is None:
        return
    if sorted(int(axis) % 4 for axis in axes.reshape(-1)) != [2, 3]:
        return
    keeps = node.attributes.get("keepdims")
    made = [ir.node("GlobalAveragePool", [x])]
    if keeps is not None and not keeps.as_int():
        # Behind a Flatten, ONNX Runtime would not see the codes.
        shape = _initializer(graph, f"{node.outputs[0].name}.shape", np.array([0, -1], dtype=np.int64))
        made.append(ir.node("Reshape", [made[0].outputs[0], shape]))
    made[0].outputs[0].shape = ir.Shape([*list(x.shape)[:2], 1, 1])
    _replace(graph, node, made)


def _behind_codes(graph: ir.Graph, node: ir.Node) -> None:
    """Bounds of a tensor that is only read to be quantized become bounds of its codes.

    Rounding is monotone, so ``Q(clip(x, a, b)) = clip(Q(x), Q(a), Q(b))``. A runtime merges a layer with the codes that
    directly follow it. Bounds that the codes have anyway are left out, but a ReLU of this kind stays: runtimes know it.
    """
    x, readers = node.inputs[0], [use.node for use in node.outputs[0].uses()]
    bounds = _bounds(node)
    if x is None or x.dtype != ir.DataType.FLOAT or bounds is None or not readers or node.outputs[0].is_graph_output():
        return
    limits = [_codes_of(reader, bounds) for reader in readers]
    if any(each is None for each in limits):
        return
    wanted = {reader: each for reader, each in zip(readers, limits, strict=True) if each is not None}
    needed = {reader: each for reader, each in wanted.items() if _narrows(reader, each)}
    if node.op_type == "Relu" and not needed:
        return
    for reader, (low, high) in needed.items():
        codes = reader.outputs[0]
        ends = [_initializer(graph, f"{codes.name}.{end}", value) for end, value in (("low", low), ("high", high))]
        clip = ir.node("Clip", [codes, *ends])
        clip.outputs[0].shape, clip.outputs[0].type = codes.shape, codes.type
        clip.metadata_props.update(reader.metadata_props)
        ir.convenience.replace_all_uses_with(codes, clip.outputs[0], replace_graph_outputs=True)
        clip.replace_input_with(0, codes)
        graph.insert_after(reader, clip)
    ir.convenience.replace_all_uses_with(node.outputs[0], x)
    graph.remove(node, safe=True)


def _bounds(node: ir.Node) -> tuple[float, float] | None:
    """Between which numbers ``node`` keeps its input."""
    if node.op_type == "Relu":
        return 0.0, np.inf
    ends = [-np.inf, np.inf]
    for place, value in enumerate(node.inputs[1:3]):
        if value is not None:
            constant = _constant(value)
            if constant is None:
                return None
            ends[place] = float(constant)
    return ends[0], ends[1]


def _codes_of(reader: ir.Node, bounds: tuple[float, float]) -> tuple[np.ndarray, np.ndarray] | None:
    """The codes that ``reader`` gives for ``bounds``, by the rule of QuantizeLinear; ``None`` if not of 8 bits."""
    scale, zero = (*map(_constant, reader.inputs[1:]), None, None)[:2]
    if reader.op_type != "QuantizeLinear" or scale is None or zero is None or scale.size != 1 or zero.size != 1:
        return None
    if zero.dtype.itemsize > 1:  # runtimes clip no codes of 16 bits
        return None
    held = np.iinfo(zero.dtype)
    codes = np.rint(np.asarray(bounds, dtype=np.float32) / scale.reshape(()).astype(np.float32)) + zero.reshape(())
    low, high = np.clip(codes, held.min, held.max).astype(zero.dtype)
    return low, high


def _narrows(reader: ir.Node, limits: tuple[np.ndarray, np.ndarray]) -> bool:
    """Whether codes of ``reader`` are outside of ``limits`` as they are read now."""
    held = np.iinfo(limits[0].dtype)
    lows, highs = [int(held.min)], [int(held.max)]
    uses = [use.node for use in reader.outputs[0].uses()]
    if len(uses) == 1 and uses[0].op_type == "Clip":
        constants = [_constant(value) for value in uses[0].inputs[1:3]]
        if len(constants) == 2 and constants[0] is not None and constants[1] is not None:
            lows.append(int(constants[0]))
            highs.append(int(constants[1]))
    return int(limits[0]) > max(lows) or int(limits[1]) < min(highs)


def _replace(graph: ir.Graph, node: ir.Node, made: list[ir.Node]) -> None:
    """Put the chain ``made`` in the place of ``node``."""
    for new in made:
        new.metadata_props.update(node.metadata_props)
        new.outputs[0].type = node.outputs[0].type
    made[-1].outputs[0].shape = node.outputs[0].shape
    graph.insert_before(node, made)
    old, last = node.outputs[0], made[-1].outputs[0]
    ir.convenience.replace_all_uses_with(old, last, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    if last.is_graph_output():  # known by its name outside of the graph
        last.name = old.name


def _initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(np.array(array), name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _constant(value: ir.Value | None) -> np.ndarray | None:
    return None if value is None or value.const_value is None else value.const_value.numpy()
