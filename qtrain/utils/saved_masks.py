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


def keep_booleans_as_bytes_(forward: GraphModule, backward: GraphModule) -> None:
    """Change both parts of a graph: ``forward`` returns bytes, 0 or 1, where it returned large tensors of booleans.

    Values of the forward have their names as inputs of the backward, which compares them with 0.
    """
    (output,) = forward.graph.find_nodes(op="output")
    returned = output.args[0]
    readers = {node.name: node for node in backward.graph.find_nodes(op="placeholder")}
    bytes_of = {node: readers[node.name] for node in returned if _is_mask(node) and node.name in readers}
    if not bytes_of:
        return
    for node, reader in bytes_of.items():
        _read_bytes_(backward, reader)
        with forward.graph.inserting_before(output):
            kept = _converted(forward, _converted(forward, node, torch.float32), torch.uint8)
        kept.name, reader.meta["val"] = f"{node.name}_bytes", kept.meta["val"]
        output.args = (tuple(kept if each is node else each for each in output.args[0]),)
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
