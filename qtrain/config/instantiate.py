"""From a config as plain values to the frozen settings of a run, each ``_target_`` resolved once."""

import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from qtrain.config.explain import not_a_choice
from qtrain.config.schema import optional
from qtrain.config.targets import SPECIAL, check_targets, resolve_target
from qtrain.settings.component import Component
from qtrain.settings.run_settings import NOT_A_KEY, RunSettings
from qtrain.utils.errors import ConfigError

T = TypeVar("T")


def component(plain: Mapping[str, Any], *, key: str = "", allow: Sequence[str] = ()) -> Component:
    """The component that the node ``plain`` at ``key`` describes. Raises ``ConfigError`` where it cannot be built.

    ``allow`` are prefixes of targets that the user admits besides :data:`qtrain.config.targets.ADMITTED`.
    """
    check_targets(plain, where=key, allow=allow)
    return _component(plain, key, allow)


def settings_of(typed: Mapping[str, Any], *, plain: Mapping[str, Any], allow: Sequence[str] = ()) -> RunSettings:
    """The settings of a checked config: ``typed`` has the types and defaults of the schema, ``plain`` is as written.

    Its ``stages`` are left empty.
    """
    return _settings(RunSettings, {**typed, "stages": {}}, "", allow, plain=plain)


def _settings(kind: type[T], node: Mapping[str, Any], where: str, allow: Sequence[str], **given: Any) -> T:
    hints = typing.get_type_hints(kind)
    for field in fields(kind):  # type: ignore[arg-type]
        if field.metadata != NOT_A_KEY:
            key = f"{where}.{field.name}" if where else field.name
            given[field.name] = _value(hints[field.name], node.get(field.name), key, allow)
    return kind(**given)


def _value(hint: Any, value: Any, key: str, allow: Sequence[str]) -> Any:
    kind, nullable = optional(hint)
    origin = typing.get_origin(kind)
    if origin is Mapping:
        item = typing.get_args(kind)[1]
        return {str(name): _value(item, own, f"{key}.{name}", allow) for name, own in (value or {}).items()}
    if kind is Component and not value and not nullable:
        raise ConfigError(not_a_choice(key, None))
    if value is None:
        return None
    if origin is tuple:
        return tuple(value)
    if kind is Component:
        # A group's option ``none`` leaves null, or nothing in a place that has nothing else.
        return _component(value, key, allow) if value else None
    if is_dataclass(kind) and isinstance(kind, type):
        return _settings(kind, value, key, allow)
    return _nested(value, key, allow) if kind is Any else value


def _component(node: Any, key: str, allow: Sequence[str]) -> Component:
    if not isinstance(node, Mapping):
        raise ConfigError(not_a_choice(key, node))
    named = "_target_" in node
    return Component(
        key=key,
        plain=node,
        target=resolve_target(node["_target_"], where=key, allow=allow) if named else None,
        options={n: _nested(value, f"{key}.{n}", allow) for n, value in node.items() if n not in SPECIAL},
        partial=bool(node.get("_partial_", False)),
    )


def _nested(value: Any, key: str, allow: Sequence[str]) -> Any:
    """``value`` with a component in place of each node that names a target."""
    if isinstance(value, Mapping):
        if "_target_" in value:
            return _component(value, key, allow)
        return {name: _nested(item, f"{key}.{name}", allow) for name, item in value.items()}
    return [_nested(item, f"{key}.{i}", allow) for i, item in enumerate(value)] if isinstance(value, list) else value
