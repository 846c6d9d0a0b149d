"""What a compiled forward keeps for its backward: booleans, as bytes.

A ReLU behind a sum keeps one for each value, for instance, where no quantizer keeps the values themselves. On a CPU
torch's compiler stores booleans one by one, but bytes in whole vectors if they come from floats; so it reads them, too.
"""

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

FEWEST = 4096
"""Values of a tensor from which on it is worth it."""

_convert = torch.ops.prims.convert_element_type.default


def keep_booleans_as_bytes_(forward: GraphModule, backward: GraphModule, outputs: int) -> None:
    """Change both parts of a graph: ``forward`` keeps bytes, 0 or 1, where it kept large tensors of booleans.

    What it returns are ``outputs`` results, which stay, and behind them what it keeps. Kept values have their names as
    inputs of the backward, which compares them with 0.
    """
    (output,) = forward.graph.find_nodes(op="output")
    results, kept = output.args[0][:outputs], list(output.args[0][outputs:])
    readers = {node.name: node for node in backward.graph.find_nodes(op="placeholder")}
    for place, node in enumerate(kept):
        if _is_mask(node):
            with forward.graph.inserting_before(output):
                kept[place] = _converted(forward, _converted(forward, node, torch.float32), torch.uint8)
            _read_bytes_(backward, readers[node.name])
            readers[node.name].meta["val"] = kept[place].meta["val"]
    output.args = ((*results, *kept),)
    forward.recompile()
    backward.recompile()


def _is_mask(node: object) -> bool:
    value = node.meta.get("val") if isinstance(node, Node) and node.op == "call_function" else None
    if not isinstance(value, Tensor) or value.dtype != torch.bool:
        return False
    return value.numel() >= FEWEST and value.device.type == "cpu"


def _read_bytes_(graph: GraphModule, reader: Node) -> None:
    """What used ``reader`` uses a comparison of it instead."""
    users = list(reader.users)
    with graph.graph.inserting_after(reader):
        number = _converted(graph, reader, torch.float32)
    with graph.graph.inserting_after(number):
        mask = graph.graph.call_function(torch.ops.aten.ne.Scalar, (number, 0))
        mask.meta["val"] = reader.meta["val"]
    for user in users:
        user.replace_input_with(reader, mask)


def _converted(graph: GraphModule, node: Node, dtype: torch.dtype) -> Node:
    result = graph.graph.call_function(_convert, (node, dtype))
    result.meta["val"] = node.meta["val"].to(dtype)
    return result
