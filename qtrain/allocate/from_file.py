"""Bits from a file: what ``task=allocate`` has written, and a person may have edited."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import yaml

from qtrain.allocate.manual import Manual
from qtrain.spec import Allocation, LayerBits
from qtrain.utils.errors import first_line


@final
class FromFile:
    """The bits in the YAML file ``path``, whose ``layers`` maps names or patterns of names to [weight, input] bits.

    Other keys of the file, such as the method and the costs that it was found for, are for people and are not read. All
    else is as for :class:`qtrain.allocate.manual.Manual`: layers that the file does not name get ``weight`` and
    ``input`` bits, the first and the last of them ``first`` and ``last``. Raises ``ValueError`` for a file that is not
    there or has no such mapping.
    """

    def __init__(
        self,
        *,
        path: str,
        weight: int = 8,
        input: int = 8,
        first: LayerBits | None = None,
        last: LayerBits | None = None,
    ) -> None:
        self.path = path
        layers = read_layers(Path(path))
        try:
            self._manual = Manual(layers=layers, weight=weight, input=input, first=first, last=last)
        except ValueError as error:
            raise ValueError(f"{path}: {str(error).removeprefix('Manual: ')}") from error

    def __call__(self, layers: Sequence[str]) -> Allocation:
        """Bits for ``layers``. Raises ``ValueError`` where the file names a layer that is not among them."""
        try:
            return self._manual(layers)
        except ValueError as error:
            raise ValueError(f"{self.path}: {str(error).removeprefix('Manual: ')}") from error


def read_layers(path: Path) -> dict[str, tuple[int, int]]:
    """``layers`` of the YAML file ``path``. Raises ``ValueError`` in one line for what is no allocation."""
    try:
        text = path.read_text(encoding="utf-8")
        content, root = yaml.safe_load(text), yaml.compose(text, Loader=yaml.SafeLoader)
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error.strerror or error}); give a file of task=allocate") from error
    except (yaml.YAMLError, ValueError) as error:  # a date that there is not, or bytes that are no text
        raise ValueError(f"{path} is no YAML ({first_line(error)})") from error
    layers = content.get("layers") if isinstance(content, Mapping) else None
    if not isinstance(layers, Mapping) or not layers:
        raise ValueError(f"{path} has no mapping 'layers' from names to [weight, input] bits")
    if twice := _named_twice(root):
        raise ValueError(f"{path} names {', '.join(twice)} twice")
    found = {}
    for name, bits in layers.items():
        try:
            found[str(name)] = pair_of_bits(bits)
        except ValueError as error:
            raise ValueError(f"{path}: layers.{name} {error}") from error
    return found


def pair_of_bits(bits: Any) -> tuple[int, int]:
    """``bits`` as a file has them, a list of two whole numbers. Raises ``ValueError`` for anything else."""
    if isinstance(bits, list) and len(bits) == 2 and all(type(value) is int for value in bits):
        return bits[0], bits[1]
    raise ValueError(f"must be [weight, input] bits, got {bits!r}")


def _named_twice(root: yaml.Node) -> list[str]:
    """The layers that are there more than once; YAML takes the last of them without a word."""
    (layers,) = [value for key, value in root.value if key.value == "layers"][-1:]
    names = [str(key.value) for key, _ in layers.value]
    return list(dict.fromkeys(name for name in names if names.count(name) > 1))
