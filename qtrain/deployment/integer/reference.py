"""An exported network run with integers: from the codes of the image to the logits there is no other number."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from qtrain.deployment.integer.fixed import Fixed
from qtrain.deployment.integer.operators import OPERATORS
from qtrain.deployment.integer.values import Value


class NoIntegerFormError(ValueError):
    """A node that cannot be computed with integers; the message names it and says why."""


class IntegerReference:
    """Runs ``model`` node by node; :meth:`run` gives its outputs as floating-point numbers, integers times a scale.

    Raises :class:`NoIntegerFormError` where a kind of node has no integer form.
    """

    def __init__(self, model: ir.Model) -> None:
        self._graph = model.graph
        for node in self._graph:
            if node.op_type not in OPERATORS and node.op_type != "Constant":
                raise NoIntegerFormError(f"{node.name}: {node.op_type} has no integer form")
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
        """The outputs for ``feeds`` by name; ``seen`` is told each value by name as it is computed."""
        values: dict[ir.Value, Any] = dict(self._constants)
        for given in self._graph.inputs:
            values[given] = feeds[str(given.name)]
        kept = {*self._graph.outputs, *self._constants}
        for node in self._graph:
            inputs = [None if value is None else values[value] for value in node.inputs]
            try:
                made = self._made(node, inputs)
            except (OverflowError, ValueError, AttributeError, KeyError) as error:
                raise NoIntegerFormError(f"{node.name}: {error}") from error
            values[node.outputs[0]] = made
            if seen is not None:
                seen(str(node.outputs[0].name), made)
            for value in node.inputs:
                if value is not None and self._last_use[value] is node and value not in kept:
                    values.pop(value, None)  # its memory is free for what follows
        return {str(value.name): _plain(values[value]) for value in self._graph.outputs}

    def _made(self, node: ir.Node, inputs: list[Any]) -> Value:
        if node.op_type == "Constant":
            return _tensor(self._attributes[node]["value"].numpy())
        return OPERATORS[node.op_type](inputs, self._attributes[node])


def _plain(value: Value) -> Tensor:
    return (value.numbers.double() * value.scale).float() if isinstance(value, Fixed) else value


def _tensor(array: np.ndarray) -> Tensor:
    if array.dtype.name in ("int4", "uint4"):
        array = array.astype(np.int8)
    return torch.from_numpy(np.array(array))
