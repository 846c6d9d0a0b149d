"""What torch.compile makes of a function, without the time that a compiler of kernels takes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from functorch.compile import min_cut_rematerialization_partition, nop
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd


class CountingBackend:
    """A backend for ``torch.compile`` that counts its ``graphs`` from 0; graphs of before are forgotten."""

    def __init__(self) -> None:
        torch._dynamo.reset()
        self.graphs = 0

    def __call__(self, graph: Any, inputs: Any, **options: Any) -> Any:
        self.graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


def counts_graphs(monkeypatch: pytest.MonkeyPatch) -> CountingBackend:
    """From now on ``torch.compile`` compiles for the backend that this returns."""
    backend = CountingBackend()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    return backend


def kept_by_compiled(function: Callable[[Tensor], Tensor], x: Tensor, *, inputs_too: bool = True) -> list[Tensor]:
    """What the forward of compiled ``function`` returns, its result first: the rest is kept for the backward.

    Tensors without values, as the graph's compiler sees them. The result must need a gradient. Without ``inputs_too``
    only what the forward has computed counts.
    """
    kept: list[Tensor] = []

    def note(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        (output,) = (node for node in graph.graph.nodes if node.op == "output")
        nodes = [node for node in output.args[0] if inputs_too or getattr(node, "op", "") == "call_function"]
        kept.extend(node.meta["val"] for node in nodes if isinstance(getattr(node, "meta", {}).get("val"), Tensor))
        return graph

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=note, bw_compiler=nop, partition_fn=min_cut_rematerialization_partition)
    torch.compile(function, backend=backend, fullgraph=True)(x.requires_grad_()).sum().backward()
    return kept
