"""A model cut at its codes: each layer computes from codes that are given, so that no difference is handed on."""

from collections.abc import Collection

import onnx_ir as ir

GIVEN = ".given"
"""Behind the name of codes that are an input of the cut model."""


def cut(model: ir.Model, codes: Collection[str]) -> ir.Model:
    """``model`` whose values named ``codes`` are outputs, and whose readers read inputs of the same shape instead.

    The input named ``v.given`` takes the place of the codes ``v``.
    """
    made = model.clone()
    graph = made.graph
    for node in list(graph):
        for value in node.outputs:
            if value.name not in codes:
                continue
            given = ir.Value(name=f"{value.name}{GIVEN}", shape=value.shape, type=value.type)
            ir.convenience.replace_all_uses_with(value, given)
            graph.inputs.append(given)
            graph.outputs.append(value)
    return made
