"""The graph of one module's own forward, in which its children are calls; or why there is none.

``torch.fx`` runs the forward once, with stand-ins for tensors, and writes down what happens to them. All that the
forward does besides, in Python, it does not see. A module that goes on computing by its graph would do it no more. So
such a forward has no graph here.
"""

import inspect
import logging
import random
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from qtrain.models.lengths import open_lengths

log = logging.getLogger(__name__)

CONSTANT = "_tensor_constant"
"""How the names begin that the tracer gives to tensors which a forward makes from numbers."""

VALUE, NUMBER = "value", "number"
"""What the meta of an attribute's node has: the tensor that the tracer found, and that it is a plain number."""

PLAIN = (type(None), bool, int, float, str)


def own_graph(module: nn.Module, *, training: bool, given: Collection[str] = ()) -> fx.Graph:
    """The graph of ``module``'s own forward in the mode ``training``; the module is left as it was.

    Fractions among its attributes (``self.scale``) stay attributes in it, so that a later change has an effect, unless
    the forward decides by them. An optional argument has its default unless it is one of ``given``; the graph checks
    that it is left out.

    Raises an error, of whatever kind, where the forward cannot be traced, sets attributes of the module, or draws
    random numbers in Python.
    """
    concrete = {name: value for name, value in plain_defaults(module).items() if name not in given}
    if any(type(value) is float for value in vars(module).values()):
        try:
            return _attempt(module, training, True, concrete)
        except Exception:  # whatever a forward does with a number that is none yet
            log.debug("%s decides by a fraction", type(module).__name__, exc_info=True)
    return _attempt(module, training, False, concrete)


def plain_defaults(module: nn.Module) -> dict[str, Any]:
    """The optional arguments of ``module``'s forward whose defaults are numbers, texts or ``None``."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    return {
        parameter.name: parameter.default
        for parameter in parameters
        if parameter.default is not parameter.empty and isinstance(parameter.default, PLAIN)
    }


def drop_defaults_(graph: fx.Graph, names: Collection[str]) -> None:
    """Take the arguments ``names``, with which ``graph`` was traced by their defaults, and their checks out of it."""
    for node in _defaulted(graph, names):
        readers = [node]
        for reader in readers:
            readers += [user for user in reader.users if user not in readers]
        for reader in reversed(readers):
            graph.erase_node(reader)


@dataclass(frozen=True)
class Given:
    """The optional arguments that modules get: by qualified name, those of every call, and those of some calls only."""

    always: Mapping[str, tuple[str, ...]]
    sometimes: Mapping[str, tuple[str, ...]]


def given_arguments(model: nn.Module, run: Callable[[], Any]) -> Given:
    """What ``run``, a forward of ``model``, gives its modules of their optional arguments."""
    calls: dict[str, list[set[str]]] = {}

    def note(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        optional = plain_defaults(module)
        if optional:
            with suppress(TypeError):  # which the forward will raise itself
                bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
                calls.setdefault(name, []).append(
                    {n for n, value in bound.arguments.items() if n in optional and value is not optional[n]}
                )

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            hooks.enter_context(module.register_forward_pre_hook(partial(note, name), with_kwargs=True))
        run()
    always = {name: set.intersection(*sets) for name, sets in calls.items()}
    some = {name: set.union(*sets) - always[name] for name, sets in calls.items()}
    return Given(*({name: tuple(sorted(found)) for name, found in one.items() if found} for one in (always, some)))


class _Shallow(fx.Tracer):
    """Traces one module's own forward; its children are calls. With ``live`` its fractions are read as attributes."""

    def __init__(self, *, live: bool) -> None:
        super().__init__()
        self.live = live

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_args_for_root(self, *arguments: Any, **options: Any) -> Any:
        made = super().create_args_for_root(*arguments, **options)
        for name, value in list(vars(self.root).items()) if self.live else ():
            if type(value) is float:
                proxy = self.create_proxy("get_attr", name, (), {})
                proxy.node.meta[NUMBER] = True
                vars(self.root)[name] = proxy
        return made


def _attempt(module: nn.Module, training: bool, live: bool, concrete: Mapping[str, Any]) -> fx.Graph:
    before = module.training
    with open_lengths(module), _as_it_was(module) as constants:
        module.training = training
        try:
            graph = _Shallow(live=live).trace(module, dict(concrete) or None)
        finally:
            module.training = before
        for node, name in _defaulted(graph, concrete).items():
            node.target = name  # by which callers know it
        for node in [node for node in graph.nodes if node.op == "get_attr"]:
            if not node.users:
                graph.erase_node(node)
            elif str(node.target).startswith(CONSTANT):
                node.meta[VALUE] = constants()[str(node.target)]
    return graph


def _defaulted(graph: fx.Graph, names: Collection[str]) -> dict[fx.Node, str]:
    """What stands for the arguments ``names``, with which ``graph`` was traced; the tracer numbers them."""
    numbered = {f"{name}_1": name for name in names}
    return {node: numbered[node.target] for node in graph.nodes if node.op == "placeholder" and node.target in numbered}


@contextmanager
def _as_it_was(module: nn.Module) -> Iterator[Callable[[], dict[str, Tensor]]]:
    """Inside ``module`` is traced; afterwards its attributes are the old ones. Yields what gives the new constants.

    Raises ``ValueError`` where the block set attributes, or drew random numbers.
    """
    own = vars(module)
    attributes, drawn = dict(own), _random_states()
    inner = {
        name: value.copy()
        for name, value in attributes.items()
        if isinstance(value, list | dict | set) and not name.startswith("_")
    }
    known = {name for name in attributes if name.startswith(CONSTANT)}

    def constants() -> dict[str, Tensor]:
        return {
            name: value
            for name, value in own.items()
            if name.startswith(CONSTANT) and isinstance(value, Tensor) and name not in known
        }

    try:
        yield constants
        made = constants()
        changed = [
            name
            for name, value in own.items()
            if name not in made and value is not attributes.get(name) and not _stands_for(value, name)
        ]
        changed += [name for name, copy in inner.items() if len(attributes[name]) != len(copy)]
        if changed:
            raise ValueError(f"its forward sets its attribute {changed[0]}")
        if not all(np.array_equal(old, new) for old, new in zip(drawn, _random_states(), strict=True)):
            raise ValueError("its forward draws random numbers in Python")
    finally:
        own.clear()
        own.update(attributes)
        for name, copy in inner.items():
            container = attributes[name]
            container.clear()
            container.extend(copy) if isinstance(container, list) else container.update(copy)


def _stands_for(value: object, name: str) -> bool:
    """Whether ``value`` is the stand-in for the attribute ``name``, a fraction."""
    return isinstance(value, fx.Proxy) and value.node.op == "get_attr" and value.node.target == name


def _random_states() -> tuple[Any, ...]:
    """The states of the random numbers of Python, numpy and torch on the CPU, as arrays."""
    version, internal, _ = random.getstate()
    _, keys, place, *_ = np.random.get_state()
    return (np.array((version, *internal)), keys, place, torch.get_rng_state().numpy())
