"""The knob that turns bits: of all layers together, of each stage, of each block, or of each layer."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Literal, cast, final

from qtrain.spec import FULL_PRECISION, Allocation, LayerNames, Role
from qtrain.sweep.domains import Domain, KnobValues, Options
from qtrain.sweep.knobs import Effect, Knob, When

Of = Literal["both", "weight", "input"]
Per = Literal["model", "stage", "block", "layer"]

ROLES: Mapping[Of, tuple[Role, ...]] = {"both": ("weight", "input"), "weight": ("weight",), "input": ("input",)}
"""What of a layer a knob turns."""


@final
class BitWidths(Knob):
    """Bits of layers, out of ``choices``: ``of`` weights, inputs, or both alike; one value ``per`` part of the model.

    The first and the last layers have ``first_last`` bits, or, where that is ``None``, the bits of the others. Give two
    such knobs for weights and inputs with bits of their own.
    """

    def __init__(
        self,
        *,
        choices: Sequence[int],
        of: Of = "both",
        per: Per = "block",
        first_last: int | None = 8,
        when: When | None = None,
    ) -> None:
        super().__init__(when)
        check_bits("BitWidths", choices)
        check_bits("BitWidths", [8 if first_last is None else first_last])
        self.choices = Options(tuple(sorted(set(choices))))
        self.of, self.per, self.first_last = of, per, first_last

    def domains(self, layers: Sequence[str]) -> dict[str, Domain]:
        if not self._free(layers):
            raise ValueError(
                f"BitWidths: the model has {len(layers)} quantizable layers, first and last; give first_last=null"
            )
        return {self._suffix(group): self.choices for group in self.groups(layers)}

    def effect(self, name: str, values: KnobValues, layers: Sequence[str]) -> Effect:
        bits = {
            layer: self._pair(cast(int, values[self._suffix(group)]))
            for group, members in self.groups(layers).items()
            for layer in members
        }
        if self.first_last is not None:
            bits |= {layer: self._pair(self.first_last) for layer in first_last_of(layers)}
        return Effect(bits=bits)

    def values_of(self, bits: Allocation, layers: Sequence[str]) -> dict[str, int]:
        """The value of each parameter, by what its name adds to the knob's, that gives ``layers`` the ``bits``.

        Of layers that share a width the most counts, and a width that is none of the choices becomes the next above.
        """
        found = {}
        for group, members in self.groups(layers).items():
            wanted = max(getattr(bits[layer], role) for layer in members for role in ROLES[self.of])
            choices = [choice for choice in self.choices.values if isinstance(choice, int)]
            found[self._suffix(group)] = min((c for c in choices if c >= wanted), default=max(choices))
        return found

    def _pair(self, bits: int) -> tuple[int | None, int | None]:
        return (bits if self.of != "input" else None, bits if self.of != "weight" else None)

    def _suffix(self, group: str) -> str:
        return f".{group}" if group else ""

    def _free(self, layers: Sequence[str]) -> list[str]:
        fixed = first_last_of(layers) if self.first_last is not None else ()
        return [layer for layer in layers if layer not in fixed]

    def groups(self, layers: Sequence[str]) -> dict[str, list[str]]:
        """Layers that share a width, by the name of what they form; "" is the model."""
        stages, blocks = model_stages(layers), model_blocks(layers)
        groups: dict[str, list[str]] = {}
        for layer in self._free(layers):
            group = {"model": "", "stage": stages[layer], "block": blocks[layer], "layer": layer}[self.per]
            groups.setdefault(group, []).append(layer)
        return groups


def check_bits(owner: str, choices: Sequence[int]) -> None:
    """Raise ``ValueError`` unless ``choices`` of the knob ``owner`` are bit widths, one at least."""
    if not choices:
        raise ValueError(f"{owner}: choices must not be empty; give bit widths such as [2, 3, 4]")
    for bits in choices:
        if bits != FULL_PRECISION and not 1 <= bits <= 16:
            raise ValueError(f"{owner}: bits must be 1..16, or {FULL_PRECISION} for full precision, got {bits}")


def model_blocks(layers: Sequence[str]) -> dict[str, str]:
    """The block that each of ``layers`` is in: the innermost numbered module around it that holds others, too.

    A layer in none is a block of its own. What stands beside the layers of a residual block belongs to it.

    >>> model_blocks(["conv1", "layer1.0.conv1", "layer1.0.downsample.0", "fc"]).values()
    dict_values(['conv1', 'layer1.0', 'layer1.0', 'fc'])
    """
    return {layer: next(iter(around), layer) for layer, around in _shared(layers).items()}


def model_stages(layers: Sequence[str]) -> dict[str, str]:
    """The stage that each of ``layers`` is in: the outermost such module, which is the block where blocks form none.

    >>> model_stages(["conv1", "layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1", "fc"]).values()
    dict_values(['conv1', 'layer1', 'layer1', 'layer1', 'fc'])
    """
    return {layer: next(reversed(around), layer) for layer, around in _shared(layers).items()}


def _shared(layers: Sequence[str]) -> dict[str, list[str]]:
    """Modules around each of ``layers`` whose own name ends in a digit and that hold others, too; innermost first."""
    numbered = {}
    for layer in layers:
        parts = layer.split(".")
        numbered[layer] = [".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1) if parts[n - 1][-1:].isdigit()]
    held = Counter(chain.from_iterable(numbered.values()))
    return {layer: [module for module in around if held[module] > 1] for layer, around in numbered.items()}


def first_last_of(layers: Sequence[str]) -> tuple[str, ...]:
    """The first and the last of ``layers``, which most recipes keep at more bits than the rest."""
    return LayerNames.of(layers).ends
