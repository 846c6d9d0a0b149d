"""An exported network run with integers: from the codes of the image to the logits there is no other number.

But for nodes that have no integer form, which are computed in floating point and named.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from qtrain.deployment.integer.fixed import Fixed
from qtrain.deployment.integer.floating import FloatingNode
from qtrain.deployment.integer.operators import OPERATORS
from qtrain.deployment.integer.values import Value
from qtrain.utils.errors import one_line


class NotComputedError(ValueError):
    """A node that cannot be computed, with integers or without; the message names it and says why."""


class IntegerReference:
    """Runs ``model`` node by node; :meth:`run` gives its outputs as floating-point numbers, integers times a scale.

    ``floating`` are the names of the nodes that were computed in floating point, each with the reason.
    """

    def __init__(self, model: ir.Model) -> None:
        self.floating: dict[str, str] = {}
        self._graph = model.graph
        self._opset = model.opset_imports[""]
        self._floating: dict[ir.Node, FloatingNode] = {}
        self._constants = {
            value: _tensor(value.const_value.numpy())
            for value in self._graph.initializers.values()
            if value.const_value is not None
        }
        self._attributes = {node: {a.name: a.value for a in node.attributes.values()} for node in self._graph}
        self._last_use = {value: node for node in self._graph for value in node.inputs if value is not None}

    @torch.no_grad()
    def run(
        self, feeds: Mapping[str, Tensor], *, seen: Callable[[str, Value], None] | None = None
    ) -> dict[str, Tensor]:
        """The outputs for ``feeds`` by name; ``seen`` is told each value by name as it is computed.

        Raises :class:`NotComputedError` where ONNX Runtime does not compute a node either, or numbers get too large.
        """
        values: dict[ir.Value, Any] = dict(self._constants)
        for given in self._graph.inputs:
            values[given] = feeds[str(given.name)]
        kept = {*self._graph.outputs, *self._constants}
        for node in self._graph:
            inputs = [None if value is None else values[value] for value in node.inputs]
            for output, made in zip(node.outputs, self._made(node, inputs), strict=False):
                values[output] = made
                if seen is not None:
                    seen(str(output.name), made)
            for value in node.inputs:
                if value is not None and self._last_use[value] is node and value not in kept:
                    values.pop(value, None)  # its memory is free for what follows
        return {str(value.name): _plain(values[value]) for value in self._graph.outputs}

    def _made(self, node: ir.Node, inputs: list[Any]) -> tuple[Value, ...]:
        if node.op_type == "Constant":
            return (_tensor(self._attributes[node]["value"].numpy()),)
        if node not in self._floating:
            try:
                if node.op_type not in OPERATORS:
                    raise ValueError(f"{node.op_type} has no integer form")
                made = OPERATORS[node.op_type](inputs, self._attributes[node])
                return made if isinstance(made, tuple) else (made,)
            except OverflowError as error:
                raise NotComputedError(f"{node.name}: {error}") from error
            except (ValueError, AttributeError, KeyError) as error:
                self.floating[str(node.name)] = str(error)
                self._floating[node] = FloatingNode(node, self._opset)
        try:
            return self._floating[node](inputs)
        except Exception as error:  # whatever the runtime does with a node
            raise NotComputedError(f"{node.name}: {self.floating[str(node.name)]}, and {one_line(error)}") from error


def _plain(value: Value) -> Tensor:
    return (value.numbers.double() * value.scale).float() if isinstance(value, Fixed) else value


def _tensor(array: np.ndarray) -> Tensor:
    if array.dtype.name in ("int4", "uint4"):
        array = array.astype(np.int8)
    return torch.from_numpy(np.array(array))
