"""Settings with other values, for what no command line of a test can say."""

from __future__ import annotations

import copy
from typing import Any

from qtrain.config.compose import from_plain
from qtrain.settings.run_settings import RunSettings


def changed(settings: RunSettings, values: dict[str, Any]) -> RunSettings:
    """``settings`` with each dotted key of ``values`` set; they go through the same checks."""
    plain = copy.deepcopy(dict(settings.plain))
    for key, value in values.items():
        *path, last = key.split(".")
        node: Any = plain
        for part in path:
            node = node[part]
        node[last] = value
    return from_plain(plain)
