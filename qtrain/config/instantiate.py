"""Build what a config describes, after the same checks that the whole config went through.

The checks and the calls use the same resolved object, so nothing can change in between. Objects below this floor
never see OmegaConf: they get plain dicts, lists and values.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from qtrain.config.targets import SPECIAL, check_targets, resolve_target
from qtrain.utils.errors import ConfigError


def instantiate(node: DictConfig | ListConfig | None, **arguments: Any) -> Any:
    """The object of ``node``'s ``_target_``, or a ``functools.partial`` where it says ``_partial_``; None for None.

    Dicts with ``_target_`` inside ``node`` are built first; a dict or list without one is built element by element.
    ``arguments`` are live objects that YAML cannot hold; they go to the outermost target and win over the config.
    Raises :class:`ConfigError`, with the full key in front, for a constructor's ``ValueError`` and for missing files.
    """
    if node is None:
        return None
    where = str(node._get_full_key(None) or "")
    root = node._get_root()
    allow = list(root.get("allow_targets") or ()) if isinstance(root, DictConfig) else []
    plain = OmegaConf.to_container(node, resolve=True, throw_on_missing=False)
    check_targets(plain, where=where, allow=allow, given=tuple(arguments))
    return _build(plain, where, allow, arguments)


def _build(node: Any, where: str, allow: list[str], arguments: dict[str, Any]) -> Any:
    if isinstance(node, list):
        return [_build(value, f"{where}.{i}", allow, {}) for i, value in enumerate(node)]
    if not isinstance(node, dict):
        return node
    built = {key: _build(value, f"{where}.{key}", allow, {}) for key, value in node.items() if key not in SPECIAL}
    if "_target_" not in node:
        return {**built, **arguments}
    target = resolve_target(node["_target_"], where=where, allow=allow)
    if node.get("_partial_", False):
        return partial(target, **{**built, **arguments})
    try:
        return target(**{**built, **arguments})
    except ConfigError:
        raise
    except (ValueError, OSError) as error:
        raise ConfigError(f"{where}: {error}" if where else str(error)) from error
