"""The graph of a whole model, down to its layers: which layer reads which output, and what lies between.

Folding, equalization and calibration from statistics need to know what lies between two layers. The names of the
modules do not tell, and a forward hook sees the layers but not the operators between them. ``torch.fx`` sees both.
"""

import logging
from collections.abc import Callable
from typing import Any

from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from qtrain.convert.own_graph import drop_defaults_, plain_defaults
from qtrain.models.lengths import open_lengths
from qtrain.models.norms import describe_norm
from qtrain.nn import Operand
from qtrain.utils.errors import first_line
from qtrain.utils.eval_mode import evaluating

log = logging.getLogger(__name__)


class _LayerTracer(fx.Tracer):
    """Traces into modules, but not into those of torch, quantized layers, convolutions and, if wanted, norms.

    A module whose forward cannot be traced (because it branches on a shape, for instance) becomes one opaque call.
    """

    def __init__(self, model: nn.Module, *, norms: bool) -> None:
        super().__init__()
        self.opaque: dict[str, str] = {}
        # Found beforehand: while the tracer is at work, a module's own parameters are proxies.
        self.leaves = {
            module
            for module in model.modules()
            if isinstance(module, _ConvNd | nn.Linear | Operand) or (norms and describe_norm(module) is not None)
        }

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m in self.leaves or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        last, stack = next(reversed(self.graph.nodes)), self.module_stack.copy()
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:  # whatever a forward does with a proxy
            while (node := next(reversed(self.graph.nodes))) is not last:
                self.graph.erase_node(node)
            self.module_stack = stack
            name = self.path_of_module(m)
            self.opaque[name] = first_line(error)
            return self.create_proxy("call_module", name, args, kwargs)


def trace(model: nn.Module, *, norms: bool = True) -> fx.GraphModule:
    """The graph of ``model`` in eval mode, with the model's own modules under their own names.

    Batch norms are calls as other modules are, with the activation that timm merges into some; without ``norms`` such a
    module is looked into.

    The modes of the modules are restored. Raises ``ValueError`` where the model's own forward cannot be traced. An
    inner module that cannot be traced is one call in the graph, which is logged.
    """
    before = set(vars(model))
    try:
        with evaluating(model), open_lengths(model):
            tracer, graph = _traced(model, norms)
        for name, reason in tracer.opaque.items():
            log.info("the graph does not look into %s: it cannot be traced: %s", name, reason)
        return fx.GraphModule(model, graph, class_name=type(model).__name__)
    except Exception as error:  # whatever a forward does with a proxy
        reason = first_line(error)
        raise ValueError(
            f"{type(model).__name__} cannot be traced by torch.fx, so the order of its layers is not known: {reason}"
        ) from error
    finally:
        for name in set(vars(model)) - before:  # constants that the tracer leaves on the model
            delattr(model, name)


def _traced(model: nn.Module, norms: bool) -> tuple[_LayerTracer, fx.Graph]:
    """Optional arguments have their defaults."""
    tracer, defaults = _LayerTracer(model, norms=norms), plain_defaults(model)
    graph = tracer.trace(model, defaults or None)
    drop_defaults_(graph, defaults)
    return tracer, graph


def called(graph: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The module that ``node`` calls, or ``None`` if it calls no module."""
    return graph.get_submodule(str(node.target)) if node.op == "call_module" else None


def calls(graph: fx.GraphModule) -> list[tuple[fx.Node, nn.Module]]:
    """The calls of modules in the order in which they run, with the module."""
    return [(node, module) for node in graph.graph.nodes if (module := called(graph, node)) is not None]


def called_once(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the module that ``node`` calls is called nowhere else."""
    return sum(module is called(graph, node) for _, module in calls(graph)) == 1


class Skipped:
    """The modules that were left unchanged, and why; :meth:`log` logs one line for each reason."""

    SHOWN = 4

    def __init__(self, what: str) -> None:
        self.what = what
        self.names: dict[str, list[str]] = {}

    def add(self, name: str, reason: str) -> None:
        self.names.setdefault(reason, []).append(name)

    def log(self) -> None:
        for reason, names in self.names.items():
            more = f" and {len(names) - self.SHOWN} more" if len(names) > self.SHOWN else ""
            log.warning("%s: %s%s: %s", self.what, ", ".join(names[: self.SHOWN]), more, reason)
