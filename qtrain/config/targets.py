"""What `_target_` may name, and whether the arguments beside it fit.

A config decides which code runs, and configs travel: from a paper's repository, from a sweep, from a colleague. So a
target must lie in an admitted part of an admitted package, under its own name and not under an alias; and the
constructor's signature is the schema of its arguments. The same holds for an argument that names code, a ``builder``;
the ``options`` beside it are held against that builder's signature.
"""

import inspect
import re
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from qtrain.utils.compat import import_torchmetrics
from qtrain.utils.errors import ConfigError
from qtrain.utils.importing import import_without
from qtrain.utils.suggestions import did_you_mean
from qtrain.utils.user_code import BuilderPath, import_builder, parameters_of, takes_any

ADMITTED = (
    "qtrain",
    "torch.nn",
    "torch.optim",
    "torchvision.models",
    "torchvision.ops",
    "torchvision.transforms",
    "timm.layers",
    "timm.loss",
    "timm.optim",
    "timm.scheduler",
    "pytorch_lightning.accelerators",
    "pytorch_lightning.callbacks",
    "pytorch_lightning.loggers",
    "pytorch_lightning.plugins",
    "pytorch_lightning.profilers",
    "pytorch_lightning.strategies",
    "pytorch_lightning.trainer",
)
"""Where the object behind a target may be defined. What loads pickles, fetches code or starts processes
(torch.hub, torch.load, torch.package, torch.utils.cpp_extension, ...) lies outside."""

REFUSED = (
    "qtrain.api", "qtrain.cli", "qtrain.config", "qtrain.packed.load", "qtrain.packed.networks", "qtrain.packed.save",
    "qtrain.pipeline", "qtrain.run_task", "qtrain.storage.description", "qtrain.tasks", "qtrain.utils",
)  # fmt: skip
"""What lies in an admitted part and is refused all the same: a config that could call the command line could give
itself any permission, and what imports code by its name could be given any name."""

SPECIAL = {"_target_": str, "_partial_": bool}
"""Keys that are no arguments. Hydra's `_args_` is missing on purpose: arguments are given by name."""

SCALARS: dict[Any, type | tuple[type, ...]] = {
    int: int, float: (int, float), bool: bool, str: str, None: type(None), type(None): type(None),
}  # fmt: skip
"""Type of an argument -> types of plain values that fit it; a ``bool`` fits ``bool`` alone."""

_DOTTED = re.compile(r"[A-Za-z]\w*(\.[A-Za-z]\w*)+")


def check_targets(node: Any, *, where: str = "", allow: Sequence[str] = (), given: Sequence[str] = ()) -> None:
    """Check each dict with ``_target_`` in the plain container ``node``, itself and all that it holds.

    ``where`` is the full key of ``node``. ``allow`` are prefixes that the user admitted besides :data:`ADMITTED`.
    ``given`` names arguments that the caller will add to ``node`` itself. Raises :class:`ConfigError`.
    """
    for key, value in _children(node):
        check_targets(value, where=f"{where}.{key}" if where else key, allow=allow)
    if not isinstance(node, Mapping):
        return
    if "_target_" in node:
        target = resolve_target(node["_target_"], where=where, allow=allow)
        _check_call(node, where or "the config", target, given, allow)
    elif "_partial_" in node:
        raise ConfigError(f"{where}: _partial_ stands without _target_; give _target_ as well, or remove it")


def import_libraries() -> None:
    """Import the libraries behind the targets of every config, without what they look for and qtrain does not use.

    That is scipy.signal for an audio metric of torchmetrics, which Lightning imports, and wandb for timm's summaries.
    """
    import_torchmetrics()
    import_without("timm", "wandb")


def resolve_target(
    target: Any, *, where: str = "", key: str = "_target_", allow: Sequence[str] = ()
) -> Callable[..., Any]:
    """The class or function that ``target``, the value of ``key`` in the node ``where``, names, if it may be named.

    What ``allow`` names exactly is admitted wherever it is defined; everything else must be defined where it may be.
    """
    place = f"{where}.{key}" if where else key
    if not isinstance(target, str) or not _DOTTED.fullmatch(target):
        example = "qtrain.quantizers.uniform.lsq.LSQ" if key == "_target_" else "mypackage.build"
        raise ConfigError(f"{place}: must be a dotted name such as {example}, got {target!r}")
    admitted = (*ADMITTED, *allow)
    packages = {prefix.split(".")[0] for prefix in admitted}
    refusal = (
        f"{place}: {target!r} is not admitted (admitted: {', '.join(sorted(packages))}, and of these not all); "
        f"if you trust it, add on the command line allow_targets=[{target}]"
    )
    if target.split(".")[0] not in packages:
        raise ConfigError(refusal)
    try:
        found = import_builder(BuilderPath(target))
    except ValueError as error:
        raise ConfigError(f"{place}: {error}") from error
    # An alias does not help: torch.nn.functional.os.system would be caught here, as the os module's own.
    identity = f"{getattr(found, '__module__', '')}.{getattr(found, '__qualname__', '')}"
    if (target not in allow and not _lies_in(identity, admitted)) or _lies_in(identity, REFUSED):
        raise ConfigError(refusal)
    if key == "_target_" and not (inspect.isclass(found) or inspect.isfunction(found)):
        raise ConfigError(f"{place}: {target!r} is neither a class nor a function")
    resolved: Callable[..., Any] = found
    return resolved


def _lies_in(name: str, prefixes: Iterable[str]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def _children(node: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        yield from ((str(key), value) for key, value in node.items())
    elif isinstance(node, list | tuple):
        yield from ((str(i), value) for i, value in enumerate(node))


def _check_call(
    node: Mapping[str, Any], where: str, target: Callable[..., Any], given: Sequence[str], allow: Sequence[str]
) -> None:
    for key, kind in SPECIAL.items():
        if key in node and not isinstance(node[key], kind):
            raise ConfigError(f"{where}.{key}: must be {kind.__name__}, got {node[key]!r}")
    arguments = {key: value for key, value in node.items() if key not in SPECIAL}
    hints = _check_arguments(arguments, where, target, given, partial=node.get("_partial_", False))
    for name, value in arguments.items():
        if hints.get(name) is BuilderPath:
            builder = resolve_target(value, where=where, key=name, allow=allow)
            # What else it needs, the data may give; so what lacks is said where it is called.
            _check_arguments(arguments.get("options") or {}, f"{where}.options", builder, (), partial=True)


def _check_arguments(
    arguments: Mapping[str, Any], where: str, target: Callable[..., Any], given: Sequence[str], *, partial: bool
) -> dict[str, Any]:
    """Hold ``arguments`` against the signature of ``target``, whose type hints are returned."""
    _check_names(arguments, where, target, given, partial=partial)
    hints = _hints(target)
    for name, value in arguments.items():
        if name in hints and not admits(hints[name], value):
            raise ConfigError(f"{where}.{name}: {_called(target)} takes {describe_hint(hints[name])}, got {value!r}")
    return hints


def _called(target: Callable[..., Any]) -> str:
    return getattr(target, "__name__", type(target).__name__)


def _check_names(
    arguments: Iterable[str], where: str, target: Callable[..., Any], given: Sequence[str], *, partial: bool
) -> None:
    """Each of ``arguments`` must be one of ``target``; with those ``given``, none may lack unless it is ``partial``."""
    owner, named = _called(target), parameters_of(target)
    for name in arguments:
        if name not in named and (not takes_any(target) or name.startswith("_")):
            known = ", ".join(named) or "nothing"
            raise ConfigError(
                f"{where}.{name}: {owner} has no such argument{did_you_mean(name, named)} (it takes {known})"
            )
    if not partial:
        _check_complete(named, {*arguments, *given}, f"{where}: {owner}")


def _check_complete(named: Mapping[str, inspect.Parameter], there: Collection[str], owner: str) -> None:
    lacking = [name for name, p in named.items() if p.default is p.empty and name not in there]
    if lacking:
        raise ConfigError(f"{owner} needs {', '.join(lacking)}")


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    """Type hints of the arguments; none where they cannot be evaluated (some third-party code)."""
    source: Any = target
    if inspect.isclass(target) and target.__init__ is not object.__init__:
        source = target.__init__
    try:
        return typing.get_type_hints(source)
    except Exception:  # a hint may be any expression
        return {}


def admits(hint: Any, value: Any) -> bool:
    """Whether ``value``, as YAML gives it, fits ``hint``. What cannot be decided here is admitted.

    ``int`` is a fine ``float``, ``bool`` is no ``int``, a list is a fine tuple, and a dict with ``_target_`` stands
    for the object that it will become.
    """
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(admits(part, value) for part in parts)
    if origin is typing.Literal:
        return value in parts
    if hint in SCALARS:
        return isinstance(value, SCALARS[hint]) and (hint is bool or not isinstance(value, bool))
    if isinstance(value, Mapping) and "_target_" in value:
        return True
    container = origin or hint
    return _class_admits(container, parts, value) if inspect.isclass(container) else True


def _class_admits(kind: type, parts: Sequence[Any], value: Any) -> bool:
    """Whether ``value``, which is no dict with ``_target_``, fits the class ``kind``, a container of ``parts``."""
    if issubclass(kind, Path):
        return isinstance(value, str)
    if issubclass(kind, Enum):
        return value in [*kind.__members__]
    if issubclass(kind, Mapping):
        return isinstance(value, Mapping) and _elements_fit(dict, parts[1:], [*value.values()])
    if issubclass(kind, tuple) or (issubclass(kind, Iterable) and kind.__module__ in ("builtins", "collections.abc")):
        return isinstance(value, list) and _elements_fit(kind, parts, value)
    # What is left of qtrain and torch are objects, for which neither a plain value nor a list can stand.
    return kind.__module__.split(".")[0] not in ("qtrain", "torch")


def _elements_fit(kind: type, parts: Sequence[Any], values: Sequence[Any]) -> bool:
    """Whether ``values`` fit ``parts`` one by one, as in ``tuple[int, str]``, or all of them the first."""
    if issubclass(kind, tuple) and parts and parts[-1] is not Ellipsis:
        return len(values) == len(parts) and all(map(admits, parts, values))
    return not parts or all(admits(parts[0], value) for value in values)


def describe_hint(hint: Any) -> str:
    """``hint`` as a reader would write it: ``float or null``."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(describe_hint(part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    if hint is type(None):
        return "null"
    if typing.get_origin(hint) is None and inspect.isclass(hint):
        return hint.__name__ if hint.__module__ == "builtins" else f"{hint.__name__} (a dict with _target_)"
    return str(hint).replace("typing.", "").replace("collections.abc.", "")
