"""Turning sums, products and softmax in a model's forward into modules that can be quantized.

A module whose forward contains such an operation is traced by ``torch.fx``, without looking into its children. The
operation becomes a child module, and the traced module replaces the old one, with the same children, names and
parameters.
"""

import logging
import operator
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qtrain.convert.layers import OPERATIONS
from qtrain.convert.replace import replace_module
from qtrain.utils.compat import share_hooks_
from qtrain.utils.eval_mode import evaluating

log = logging.getLogger(__name__)

_FUNCTIONS: dict[Callable[..., Any], str] = {
    operator.add: "add", operator.iadd: "add", torch.add: "add",
    operator.matmul: "matmul", torch.matmul: "matmul", torch.bmm: "matmul",
    torch.softmax: "softmax", F.softmax: "softmax",
}  # fmt: skip
_METHODS = {"add": "add", "add_": "add", "matmul": "matmul", "bmm": "matmul", "softmax": "softmax"}

OPERANDS = ("input", "other", "mat2")
"""Names by which torch's functions and methods take what they add, multiply or normalize."""


class _Shallow(fx.Tracer):
    """Traces one module's own forward; its children are calls."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


@torch.no_grad()
def expose_operations(model: nn.Module, kinds: Collection[str], example: Tensor) -> list[str]:
    """Replace the operations of ``kinds`` (``add``, ``matmul``, ``softmax``) by modules; returns the qualified names.

    Only sums of two activations count: residual sums, not the addition of a parameter. Attention that torch computes in
    one fused call is split into operations first, which changes its output only by rounding errors. A module that
    cannot be traced is left unchanged and logged.
    Raises ``ValueError`` for an unknown kind, where nothing of a kind is found, and where the output on ``example``
    (N, C, H, W) changes by more than rounding errors.
    """
    if unknown := set(kinds) - set(OPERATIONS):
        raise ValueError(f"operations: no kind {sorted(unknown)}; use {sorted(OPERATIONS)}")
    if not kinds:
        return []
    with evaluating(model):
        expected = model(example)
    exposed = insert_operations_(model, kinds)
    for kind in kinds:
        if not any(isinstance(model.get_submodule(name), OPERATIONS[kind]) for name in exposed):
            raise ValueError(
                f"operations.{kind}: {type(model).__name__} has none that can be exposed; leave operations.{kind} null"
            )
    with evaluating(model):
        if not torch.allclose(model(example), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())):
            raise ValueError(
                f"operations: {type(model).__name__} computes something else once its operations are modules; "
                "leave operations null for it"
            )
    return exposed


def insert_operations_(model: nn.Module, kinds: Collection[str], *, among: Collection[str] | None = None) -> list[str]:
    """As :func:`expose_operations`, for a model of which it is known that all goes well; nothing is run or checked.

    ``among`` are the names of the modules to look into; without it, all are.
    """
    exposed: list[str] = []
    for name, module in list(model.named_modules()):
        if name and (among is None or name in among) and not type(module).__module__.startswith("torch.nn"):
            traced, inserted = _traced(name, module, kinds)
            if traced is not None:
                replace_module(model, module, traced)
                exposed += [f"{name}.{inner}" for inner in inserted]
    return exposed


def _traced(name: str, module: nn.Module, kinds: Collection[str]) -> tuple[nn.Module | None, list[str]]:
    """``module`` with its operations as children, and their names; ``None`` where it has no operation of ``kinds``."""
    fused = bool(getattr(module, "fused_attn", False))
    if fused:
        setattr(module, "fused_attn", False)  # noqa: B010 - a plain attribute of timm's attentions
    try:
        graph, other = _graph(module), _graph(module, training=not module.training)
    except Exception as error:  # whatever a forward does with a proxy
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        log.info("operations inside %s are left as they are: it cannot be traced: %s", name, reason)
        _restore(module, fused)
        return None, []
    nodes = [(node, kind) for node in graph.nodes if (kind := _kind(node)) is not None and kind in kinds]
    if nodes and str(graph) != str(other):
        log.warning("operations inside %s stay as they are: its forward depends on the mode (training or not)", name)
        nodes = []
    if not nodes:
        _restore(module, fused)
        return None, []
    traced = fx.GraphModule(module, graph, class_name=type(module).__name__)
    for key, value in vars(module).items():
        # Plain attributes (num_features, drop_path rate, ...) that others read.
        if key not in vars(traced) and not key.startswith("_"):
            setattr(traced, key, value)
    inserted = []
    for number, (node, kind) in enumerate(nodes):
        child = f"{kind}_{number}"
        traced.add_submodule(child, OPERATIONS[kind]())
        with graph.inserting_before(node):
            arguments = _arguments(node)
            options = {k: v for k, v in node.kwargs.items() if kind == "softmax" and k == "dim"}
            node.replace_all_uses_with(graph.call_module(child, arguments[:2], options))
        graph.erase_node(node)
        inserted.append(child)
    graph.lint()
    traced.graph = graph
    share_hooks_(module, traced)
    traced.train(module.training)
    return traced, inserted


def _restore(module: nn.Module, fused: bool) -> None:
    if fused:
        setattr(module, "fused_attn", True)  # noqa: B010


def _graph(module: nn.Module, training: bool | None = None) -> fx.Graph:
    """The graph of ``module``'s own forward, with optional arguments left at their defaults."""
    before = module.training
    module.training = before if training is None else training
    try:
        return _Shallow().trace(module)
    finally:
        module.training = before


def _kind(node: fx.Node) -> str | None:
    """Which operation on activations ``node`` is; both operands must be computed ones, not parameters or numbers."""
    kind = None
    if node.op == "call_function":
        kind = _FUNCTIONS.get(node.target)  # type: ignore[arg-type]
    elif node.op == "call_method":
        kind = _METHODS.get(str(node.target))
    if kind in ("add", "matmul"):
        operands = [a for a in _arguments(node)[:2] if isinstance(a, fx.Node) and a.op != "get_attr"]
        return kind if len(operands) == 2 and not set(node.kwargs) - set(OPERANDS) else None
    return kind


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    """What ``node`` works on, by its place or by its name."""
    return (*node.args, *(node.kwargs[name] for name in OPERANDS if name in node.kwargs))
