"""What the graph of a whole model tells of a module's own forward, and a trace of that forward alone does not."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import fx, nn

from qtrain.convert.fold import foldable
from qtrain.convert.graph import Skipped, trace
from qtrain.convert.operation_nodes import is_concat, tensors_of
from qtrain.models.norms import describe_norm, is_norm
from qtrain.utils.calls import first_argument

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Callers:
    """Both by the qualified name of the module whose forward contains the call.

    ``norms`` are those that no layer takes in, by their qualified names; norms of the image itself are not among them.
    ``lists`` are the lengths of the lists that it concatenates, in the order of all calls.
    """

    norms: Mapping[str, frozenset[str]] = field(default_factory=dict)
    lists: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def lengths(self, caller: str, nodes: Sequence[fx.Node]) -> dict[fx.Node, int]:
        """The length of what each of ``nodes`` concatenates, which are those of ``caller``'s own forward.

        Empty where the caller is called several times, since lists may then have several lengths.
        """
        found = self.lists.get(caller, ())
        return dict(zip(nodes, found, strict=True)) if len(found) == len(nodes) else {}


def callers_in(model: nn.Module) -> Callers:
    """What is called where in ``model``; nothing, which is logged, for a model that cannot be traced."""
    try:
        graph = trace(model)
        return Callers(_norms(model, graph), _lists(graph))
    except ValueError as error:
        log.info("concatenated lists and norms that no layer takes in are not quantized: %s", error)
        return Callers()


def _norms(model: nn.Module, graph: fx.GraphModule) -> dict[str, frozenset[str]]:
    names = {name for name, module in model.named_modules() if is_norm(module)}
    if any(describe_norm(model.get_submodule(name)) is not None for name in names):
        names -= {norm for _, _, norm, _ in foldable(model, "operations.norm", Skipped("no layer takes it in"))}
    found: dict[str, set[str]] = {}
    for node in graph.graph.nodes:
        stack = _stack(node)
        place = next((place for place, name in enumerate(stack) if name in names), None)
        source = first_argument(node.args, node.kwargs)
        if place is not None and not (isinstance(source, fx.Node) and source.op == "placeholder"):
            found.setdefault(stack[place - 1] if place else "", set()).add(stack[place])
    return {caller: frozenset(norms) for caller, norms in found.items()}


def _lists(graph: fx.GraphModule) -> dict[str, tuple[int, ...]]:
    lengths: dict[str, list[int]] = {}
    for node in graph.graph.nodes:
        if is_concat(node):
            caller = (_stack(node) or [""])[-1]
            lengths.setdefault(caller, []).append(len(tensors_of(node)))
    return {caller: tuple(found) for caller, found in lengths.items()}


def _stack(node: fx.Node) -> list[str]:
    """The modules in whose forwards ``node`` is, from the outermost; torch numbers further calls of one."""
    return [name.split("@")[0] for name in node.meta.get("nn_module_stack", ())]
