"""A file as it is found: read, and its constants and operations beside those that the student gives."""

from collections.abc import Iterator

import numpy as np
import onnx
import onnx_ir as ir

from qtrain.deployment.onnx.write import FORMAT, FORMAT_KEY
from qtrain.utils.errors import one_line


def read(file: bytes) -> ir.Model:
    """The ONNX model of ``file``. Raises ``ValueError`` in one line where it is damaged or newer than what is known."""
    try:
        model = onnx.load_from_string(file)
        opset = max((given.version for given in model.opset_import if given.domain in ("", "ai.onnx")), default=0)
        known = onnx.defs.onnx_opset_version()
        newer = _newer(model, opset, known)
        if newer is None:
            onnx.checker.check_model(model)
            return ir.from_proto(model)
    except Exception as error:  # whatever a parser does with foreign bytes
        raise ValueError(f"the file is damaged or no ONNX model ({one_line(error)}); export it anew") from error
    raise ValueError(newer)


def _newer(model: onnx.ModelProto, opset: int, known: int) -> str | None:
    """What of ``model`` is newer than what is installed here."""
    if opset > known:
        return f"the file has opset {opset}, onnx {onnx.__version__} knows {known}; update onnx, or export anew"
    if model.ir_version > onnx.IR_VERSION:
        return (
            f"the file has version {model.ir_version} of ONNX, onnx {onnx.__version__} knows {onnx.IR_VERSION}; "
            "update onnx, or export anew"
        )
    written = next((entry.value for entry in model.metadata_props if entry.key == FORMAT_KEY), str(FORMAT))
    if int(written) > FORMAT:
        return f"the file has version {written} of qtrain's exports, this qtrain reads {FORMAT}; update qtrain"
    return None


def batch_of(model: ir.Model) -> int | None:
    """How many images ``model`` takes at a time, ``None`` for any number."""
    shape = model.graph.inputs[0].shape if model.graph.inputs else None
    length = None if shape is None or not len(shape) else shape[0]
    return length if isinstance(length, int) else None


def image_size(model: ir.Model) -> tuple[int, ...]:
    """(C, H, W) of the images that ``model`` takes. Raises ``ValueError`` where it does not say so."""
    shape = model.graph.inputs[0].shape if model.graph.inputs else None
    size = () if shape is None else tuple(shape)[1:]
    if len(size) != 3 or not all(isinstance(length, int) for length in size):
        raise ValueError("the file does not say of what size its images are; export it anew")
    return tuple(int(str(length)) for length in size)


def changed(made: ir.Model, model: ir.Model) -> list[str]:
    """By name, which constants and nodes of ``model`` are not those of ``made``, which the student gives."""
    return ["".join(c if c.isprintable() else "?" for c in fault) for fault in _changes(made, model)]


def _changes(made: ir.Model, model: ir.Model) -> Iterator[str]:
    for name, value in made.graph.initializers.items():
        other = model.graph.initializers.get(name)
        if other is None or other.const_value is None:
            yield f"{name}: the file lacks it"
            continue
        assert value.const_value is not None
        expected, found = value.const_value.numpy(), other.const_value.numpy()
        if expected.dtype != found.dtype or expected.shape != found.shape:
            yield f"{name}: {found.dtype} of shape {found.shape}, not {expected.dtype} of {expected.shape}"
        elif differ := int(np.count_nonzero(_octets(expected) != _octets(found))):
            yield f"{name}: {differ} of its bytes are not the student's"
    ours, theirs = _described(made), _described(model)
    for name in dict.fromkeys((*ours, *theirs)):
        if name not in theirs:
            yield f"{name}: the file lacks it"
        elif name not in ours:
            yield f"{name}: the file computes it, the student does not"
        elif ours[name] != theirs[name]:
            yield f"{name}: the file computes something else"
    for _, operator, _ in model.functions:
        yield f"{operator}: the file defines this operator itself"


def _octets(array: np.ndarray) -> np.ndarray:
    return np.frombuffer(np.ascontiguousarray(array).tobytes(), dtype=np.uint8)


def _plain(value: object) -> str:
    """What an attribute is in a file, where floating-point numbers have 32 bits."""
    if isinstance(value, ir.TensorProtocol):
        return value.tobytes().hex()
    return str(float(np.float32(value)) if isinstance(value, float) else value)


def _described(model: ir.Model) -> dict[str, str]:
    """Name of a node, and of the network's ends -> all that it computes."""
    described: dict[str, str] = {}
    for node in model.graph:
        attributes = sorted(f"{a.name}={_plain(getattr(a, 'value', None))}" for a in node.attributes.values())
        inputs, outputs = ([v.name if v else None for v in values] for values in (node.inputs, node.outputs))
        name = str(node.name) if str(node.name) not in described else f"{node.name} once more"
        described[name] = f"{node.domain} {node.op_type} {inputs} {outputs} {attributes}"
    for end, values in (("inputs", model.graph.inputs), ("outputs", model.graph.outputs)):
        described[end] = str([(value.name, str(value.dtype), str(value.shape)) for value in values])
    return described
