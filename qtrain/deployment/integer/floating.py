"""Nodes without an integer form: ONNX Runtime computes each alone, in floating point of 32 bits."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from qtrain.deployment.integer.fixed import WIDE, Fixed, of_values
from qtrain.deployment.integer.values import Value


class FloatingNode:
    """Computes what ``node`` does, with the operators of the version ``opset``.

    Called with the values of its inputs, it gives those of its outputs. A floating-point output becomes numbers of
    :data:`WIDE` bits, whose scale follows the largest of them: it is known only once the images are seen.
    """

    def __init__(self, node: ir.Node, opset: int) -> None:
        self._node, self._opset = node, opset
        self._session: Any = None

    def __call__(self, inputs: Sequence[Value | None]) -> tuple[Value, ...]:
        given = {f"input_{place}": _array(value) for place, value in enumerate(inputs) if value is not None}
        for place, value in enumerate(self._node.inputs):
            if value is not None and value.dtype is not None and not value.dtype.is_floating_point():
                given[f"input_{place}"] = given[f"input_{place}"].astype(value.dtype.numpy())
        if self._session is None:
            self._session = self._made(given)
        found = self._session.run(None, given)
        return tuple(
            of_values(torch.from_numpy(array), bits=WIDE) if array.dtype == np.float32 else _codes(array)
            for array in found
        )

    def _made(self, given: dict[str, np.ndarray]) -> Any:
        import onnxruntime as ort

        inputs = [
            None if value is None else _value(f"input_{place}", given[f"input_{place}"])
            for place, value in enumerate(self._node.inputs)
        ]
        outputs = [ir.Value(name=f"output_{place}", type=value.type) for place, value in enumerate(self._node.outputs)]
        node = ir.Node("", self._node.op_type, inputs, self._node.attributes, outputs=outputs, name=self._node.name)
        present = [value for value in inputs if value is not None]
        graph = ir.Graph(present, outputs, nodes=[node], opset_imports={"": self._opset}, name="node")
        options = ort.SessionOptions()
        options.log_severity_level = 3
        data = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
        return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def _value(name: str, array: np.ndarray) -> ir.Value:
    kind = ir.TensorType(ir.DataType.from_numpy(array.dtype))
    return ir.Value(name=name, type=kind, shape=ir.Shape([None] * array.ndim))


def _array(value: Value) -> np.ndarray:
    if isinstance(value, Fixed):
        value = value.numbers.double() * value.scale
    array: np.ndarray = (value.float() if value.is_floating_point() else value).numpy()
    return array


def _codes(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array if array.dtype == np.bool_ else array.astype(np.int64))
