"""Bits from a file: what ``task=allocate`` has written, and a person may have edited."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import yaml

from qtrain.allocate.manual import Manual
from qtrain.spec import Allocation, LayerBits
from qtrain.utils.suggestions import close_matches


@final
class FromFile:
    """The bits in the YAML file ``path``: ``layers`` maps each layer's name to [weight, input] bits, 32 for float.

    Other keys of the file, such as the method and the costs that it was found for, are for people and are not read.
    Raises ``ValueError`` for a file that is not there or has no such mapping.
    """

    def __init__(self, *, path: str) -> None:
        self.path = path
        self.layers = read_allocation(Path(path))

    def __call__(self, layers: Sequence[str]) -> Allocation:
        """Bits for ``layers``. Raises ``ValueError`` where the file names other layers than these."""
        for name in self.layers:
            if name not in layers:
                raise ValueError(f"{self.path}: {name!r} is no quantizable layer{close_matches(name, layers)}")
        if missing := [name for name in layers if name not in self.layers]:
            raise ValueError(f"{self.path}: has no bits for {missing[0]!r}; it is for another model, or a line is lost")
        return {name: self.layers[name] for name in layers}


def read_allocation(path: Path) -> Allocation:
    """Layer -> bits from the YAML file ``path``. Raises ``ValueError`` in one line for what is no allocation."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"cannot read {path} ({error.strerror or error}); give a file that task=allocate wrote"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML ({str(error).splitlines()[0]})") from error
    layers = content.get("layers") if isinstance(content, Mapping) else None
    if not isinstance(layers, Mapping) or not layers:
        raise ValueError(f"{path} has no mapping 'layers' from names to [weight, input] bits")
    pairs = {str(name): _pair(path, str(name), bits) for name, bits in layers.items()}
    return Manual(layers=pairs, weight=8, input=8)(list(pairs))


def _pair(path: Path, name: str, bits: Any) -> LayerBits:
    if isinstance(bits, list) and len(bits) == 2 and all(type(value) is int for value in bits):
        return LayerBits(*bits)
    raise ValueError(f"{path}: layers.{name} must be [weight, input] bits, got {bits!r}")
