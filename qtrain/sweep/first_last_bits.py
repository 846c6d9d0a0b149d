"""The knob that turns the bits of the first and the last layer."""

from collections.abc import Sequence
from typing import cast, final

from qtrain.sweep.bit_widths import check_bits, first_last_of
from qtrain.sweep.domains import Domain, KnobValues, Options
from qtrain.sweep.knobs import Effect, Knob, When


@final
class FirstLastBits(Knob):
    """Bits of the first and the last layer, weights and inputs alike, out of ``choices``.

    It has the last word on these two layers, whatever knobs of widths there are.
    """

    def __init__(self, *, choices: Sequence[int], when: When | None = None) -> None:
        super().__init__(when)
        check_bits("FirstLastBits", choices)
        self.choices = Options(tuple(sorted(set(choices))))

    def domains(self, layers: Sequence[str]) -> dict[str, Domain]:
        return {"": self.choices}

    def effect(self, name: str, values: KnobValues, layers: Sequence[str]) -> Effect:
        bits = cast(int, values[""])
        return Effect(bits=dict.fromkeys(first_last_of(layers), (bits, bits)))
