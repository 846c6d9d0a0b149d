"""A module that computes as a graph says, and otherwise stays what it was.

Its attributes, children, hooks and methods are its own as before, and it is still an instance of its class: it gets a
class made from that one, which has the graph's code as its forward. A traced module of torch in its place would have
the children that the graph calls and nothing else, and its copies would have no hooks.
"""

import copyreg
import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import fx, nn

from qtrain.convert.own_graph import VALUE


@dataclass(frozen=True)
class _Package:
    """A Python package among the names that a forward reads, which cannot be written to a file itself."""

    name: str


GIVEN = "given_arguments"
"""The attribute in which a module that computes as a graph says has the optional arguments that the graph expects."""


def give_forward_(module: nn.Module, graph: fx.Graph, given: tuple[str, ...] = ()) -> None:
    """Let ``module`` compute as ``graph`` of :func:`qtrain.convert.own_graph.own_graph` with ``given`` says.

    The children that the graph calls must be there already. The module can be copied and, where its class can be found
    by its name, pickled.
    """
    for node in graph.nodes:
        if VALUE in node.meta:
            module.register_buffer(str(node.target), node.meta[VALUE], persistent=False)
    if given:
        setattr(module, GIVEN, given)
    if isinstance(module, fx.GraphModule):  # has its forward from a graph anyway
        module.graph = graph
        return
    code = graph.python_code("self")
    names = {
        name: _Package(value.__name__) if isinstance(value, ModuleType) else value
        for name, value in code.globals.items()
    }
    module.__class__ = _class(type(module), code.src, names)


def _class(kind: Any, source: str, names: Mapping[str, Any]) -> type:
    """A class like ``kind`` whose forward is the code ``source``, which reads ``names``."""
    try:
        return _kept_class(kind, source, tuple(sorted(names.items(), key=lambda item: item[0])))
    except TypeError:  # one of the values cannot be looked up
        return _new_class(kind, source, names)


@functools.lru_cache(maxsize=256)
def _kept_class(kind: Any, source: str, names: tuple[tuple[str, Any], ...]) -> type:
    return _new_class(kind, source, dict(names))


def _new_class(kind: type[Any], source: str, names: Mapping[str, Any]) -> type:
    space = {
        name: importlib.import_module(value.name) if isinstance(value, _Package) else value
        for name, value in names.items()
    }
    exec(compile(source, f"<operations of {kind.__name__}>", "exec"), space)

    def reduce(self: Any, protocol: Any) -> Any:
        """As ``kind`` is reduced, with what makes this class in the place of the class."""
        as_kind: Any = kind.__reduce_ex__
        made, arguments, *rest = as_kind(self, max(2, protocol))
        if made is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return made, arguments, *rest
        return _new_module, (kind, source, dict(names), *arguments[1:]), *rest

    return type(
        kind.__name__,
        (kind,),
        {"forward": space["forward"], "__reduce_ex__": reduce, "__module__": kind.__module__, "__doc__": kind.__doc__},
    )


def _new_module(kind: type[Any], source: str, names: Mapping[str, Any], *arguments: Any) -> Any:
    own = _class(kind, source, names)
    return own.__new__(own, *arguments)
