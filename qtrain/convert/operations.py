"""Turning sums, products, pools and the like in a model's forward into modules that can be quantized.

A module whose forward contains such an operation is traced by ``torch.fx``, without looking into its children. The
operation becomes a child module, and the module gets the traced forward; it stays what it was otherwise. A pool or
activation that is a module of torch is wrapped, a softmax replaced. A norm stays what it is, with the child before it.
"""

import logging
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from qtrain.convert.callers import Callers, callers_in
from qtrain.convert.operation_nodes import (
    APPLIED,
    KINDS,
    MODULES,
    PAIRS,
    arguments_of,
    first_of,
    is_concat,
    kind_of,
    tensors_of,
)
from qtrain.convert.own_forward import give_forward_
from qtrain.convert.own_graph import given_arguments, own_graph
from qtrain.convert.replace import replace_module
from qtrain.nn.operations import Add, Applied, Concat, MatMul, Multiply, NormInput, Operation, Softmax
from qtrain.utils.calls import first_argument
from qtrain.utils.eval_mode import evaluating

log = logging.getLogger(__name__)

_OF_ONE_OPERATION = ("torch.nn", "qtrain.nn.operations")
"""Where modules are defined that have no operation in their forward but what they are themselves."""

_PAIRS: dict[str, type[Add | Multiply | MatMul]] = {"add": Add, "multiply": Multiply, "matmul": MatMul}


@torch.no_grad()
def expose_operations(
    model: nn.Module, kinds: Collection[str], example: Tensor, *, required: Collection[str] | None = None
) -> list[str]:
    """Replace the operations of ``kinds`` by modules; returns the qualified names.

    Only sums and products of two activations count: residual sums, not the addition of a parameter. Attention that
    torch computes in one fused call is split into operations first, which changes its output only by rounding errors. A
    module that cannot be traced is left unchanged and logged.
    Raises ``ValueError`` for an unknown kind, where nothing of a kind in ``required`` (``None``: ``kinds``) is found,
    and where the output on ``example`` (N, C, H, W) changes by more than rounding errors.
    """
    if unknown := set(kinds) - set(KINDS):
        raise ValueError(f"operations: no kind {sorted(unknown)}; use {sorted(KINDS)}")
    if not kinds:
        return []
    expected: list[Any] = []
    with evaluating(model):
        given = given_arguments(model, lambda: expected.append(model(example)))
    if not isinstance(logits := expected[0], Tensor):
        raise ValueError(
            f"operations: {type(model).__name__} gives a {type(logits).__name__}; operations can be quantized, and a "
            "target met, only where a network gives one tensor, its logits"
        )
    for name, (argument, *_) in given.sometimes.items():
        log.info("operations inside %s are left as they are: not all calls give it %s", name or "the network", argument)
    among = {name for name, _ in model.named_modules()} - set(given.sometimes)
    exposed = insert_operations_(model, kinds, among=among, given=given.always)
    for kind in kinds if required is None else required:
        if not any(isinstance(module, Operation) and module.kind == kind for module in model.modules()):
            raise ValueError(
                f"operations.{kind}: {type(model).__name__} has none that can be exposed; leave operations.{kind} null"
            )
    with evaluating(model):
        if not torch.allclose(model(example), logits, rtol=1e-3, atol=1e-4 * float(logits.abs().max())):
            raise ValueError(
                f"operations: {type(model).__name__} computes something else once its operations are modules; "
                "leave operations null for it"
            )
    return exposed


def insert_operations_(
    model: nn.Module,
    kinds: Collection[str],
    *,
    among: Collection[str] | None = None,
    given: Mapping[str, Collection[str]] = MappingProxyType({}),
) -> list[str]:
    """As :func:`expose_operations`, for a model of which it is known that all goes well; nothing is run or checked.

    ``among`` are the names of the modules to look into or to wrap; without it, all are. ``given`` are the optional
    arguments that modules get from their callers, by the modules' names; all others have their defaults.
    """
    exposed: list[str] = []
    wrapped = {module.function for module in model.modules() if isinstance(module, Applied)}
    callers = callers_in(model) if {"norm", "concat"} & set(kinds) else Callers()
    for name, module in list(model.named_modules()):
        if module in wrapped or (among is not None and name not in among):
            continue
        if (kind := MODULES.get(type(module))) is not None:
            if kind in kinds and name and getattr(module, "dim", 0) is not None:  # torch guesses what is not given
                replace_module(model, module, _wrapped(kind, module))
                exposed.append(name)
        elif ("norm" in kinds and name in callers.norms) or not type(module).__module__.startswith(_OF_ONE_OPERATION):
            inserted = _insert_(name, module, kinds, callers, tuple(given.get(name, ())))
            exposed += [f"{name}.{inner}".lstrip(".") for inner in inserted]
    return exposed


def _wrapped(kind: str, module: nn.Module) -> Operation:
    made = Softmax(cast("int", module.dim)) if isinstance(module, nn.Softmax) else Applied(kind, module)
    made.train(module.training)
    return made


def _insert_(
    name: str, module: nn.Module, kinds: Collection[str], callers: Callers, given: tuple[str, ...]
) -> list[str]:
    """Make the operations of ``kinds`` in ``module``'s forward children of it; returns their names."""
    fused = bool(getattr(module, "fused_attn", False))
    if fused:
        setattr(module, "fused_attn", False)  # noqa: B010 - a plain attribute of timm's attentions
    try:
        graph, other = (
            own_graph(module, training=mode, given=given) for mode in (module.training, not module.training)
        )
    except Exception as error:  # whatever a forward does with a proxy
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        log.info("operations inside %s are left as they are: it cannot be traced: %s", name or "the network", reason)
        _restore(module, fused)
        return []
    norms = {norm[len(name) + 1 if name else 0 :] for norm in callers.norms.get(name, ())}
    lengths = callers.lengths(name, [node for node in graph.nodes if is_concat(node)])
    found = [(node, "norm" if _reads_plainly(module, node, norms) else kind_of(node)) for node in graph.nodes]
    nodes = [
        (node, kind)
        for node, kind in found
        if kind is not None and kind in kinds and (kind != "concat" or lengths.get(node, len(tensors_of(node))) > 1)
    ]
    if nodes and str(graph) != str(other):
        log.warning(
            "operations inside %s stay as they are: its forward depends on the mode (training or not)",
            name or "the network",
        )
        nodes = []
    if not nodes:
        _restore(module, fused)
        return []
    inserted = []
    for number, (node, kind) in enumerate(nodes):
        child = f"{kind}_{number}"
        made, arguments, options = _as_module(node, kind, lengths)
        made.train(module.training)
        module.add_module(child, made)
        with graph.inserting_before(node):
            call = graph.call_module(child, arguments, options)
        if kind == "norm":
            node.args, node.kwargs = (call, *node.args[1:]), node.kwargs if node.args else {}
        else:
            node.replace_all_uses_with(call)
            graph.erase_node(node)
        inserted.append(child)
    graph.lint()
    give_forward_(module, graph, given)
    return inserted


def _as_module(
    node: fx.Node, kind: str, lengths: Mapping[fx.Node, int]
) -> tuple[Operation, tuple[Any, ...], dict[str, Any]]:
    """The module that does what ``node`` does, and what it is called with."""
    arguments = arguments_of(node)
    if kind in PAIRS:
        return _PAIRS[kind](), arguments[:2], {}
    if kind == "norm":
        return NormInput(), (first_argument(node.args, node.kwargs),), {}
    if kind == "softmax":
        return Softmax(), arguments[:2], {key: value for key, value in node.kwargs.items() if key == "dim"}
    if kind == "concat":
        options = {("dim" if key == "axis" else key): value for key, value in node.kwargs.items()}
        return Concat(len(tensors_of(node)) or lengths[node]), node.args, options
    assert kind in APPLIED
    options = {key: value for key, value in node.kwargs.items() if key != "input"}
    further = node.args[1:] if node.args else ()
    return Applied(kind, _function(node)), (first_of(node), *further), options


def _reads_plainly(module: nn.Module, node: fx.Node, norms: Collection[str]) -> bool:
    """Whether ``node`` of ``module``'s graph calls one of ``norms``, and nothing stands before that so far."""
    if node.op != "call_module" or node.target not in norms:
        return False
    source = first_argument(node.args, node.kwargs)
    known = isinstance(source, fx.Node) and source.op == "call_module"
    return not (known and isinstance(module.get_submodule(str(source.target)), NormInput))


def _function(node: fx.Node) -> Callable[..., Tensor]:
    """The function that ``node`` calls; of a method, torch's own of that name, which a later trace can follow."""
    function: Callable[..., Tensor] = (
        getattr(torch, str(node.target)) if node.op == "call_method" else node.target  # type: ignore[assignment]
    )
    return function


def _restore(module: nn.Module, fused: bool) -> None:
    if fused:
        setattr(module, "fused_attn", True)  # noqa: B010
