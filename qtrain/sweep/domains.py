"""The values that one parameter of a search can take: some that are listed, or a range of numbers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import TypeAlias, TypeGuard, final

KnobValue: TypeAlias = "bool | int | float | str | Sequence[KnobValue] | None"
"""What a knob can have: a plain value, as JSON has them."""

KnobValues: TypeAlias = "Mapping[str, KnobValue]"
"""Knob, or parameter of a knob -> its value."""

STEP = 0.1
"""How far a number moves to its neighbor, as a part of its range."""


@final
@dataclass(frozen=True)
class Options:
    """One of ``values``, which are plain: numbers, strings, booleans, ``None``, lists."""

    values: tuple[KnobValue, ...]

    @property
    def ordered(self) -> bool:
        """Whether neighbors in the list are near each other: rising numbers, such as bit widths."""
        numbers = [value for value in self.values if is_number(value)]
        return len(numbers) == len(self.values) and all(a < b for a, b in pairwise(numbers))

    def index(self, value: object) -> int:
        """The place of ``value``. Raises ``ValueError`` where it is none of them; 1 is not ``True``."""
        for place, known in enumerate(self.values):
            if known == value and isinstance(known, bool) == isinstance(value, bool):
                return place
        raise ValueError(f"must be one of {', '.join(map(str, self.values))}, got {value!r}")

    def check(self, value: object) -> None:
        """Raise ``ValueError`` unless ``value`` is one of them."""
        self.index(value)

    def grid(self, points: int) -> Sequence[KnobValue]:
        """All values, however many ``points`` a range counts as."""
        return self.values

    def draw(self, source: Random) -> KnobValue:
        return source.choice(self.values)

    def neighbor(self, value: KnobValue, source: Random) -> KnobValue:
        """The value before or after, of numbers; any other one, of what has no order."""
        place = self.index(value)
        near = (place - 1, place + 1) if self.ordered else range(len(self.values))
        others = [self.values[i] for i in near if i != place and 0 <= i < len(self.values)]
        return source.choice(others) if others else value


@final
@dataclass(frozen=True)
class Interval:
    """A number from ``low`` to ``high``, both among them; ``log``: evenly spread are its digits, not its values.

    A share of 0 is ``low``, of 1 ``high``; ``whole`` numbers are rounded.
    """

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def at(self, share: float) -> float:
        if self.log:
            return self.rounded(math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low))))
        return self.rounded(self.low + share * (self.high - self.low))

    def rounded(self, value: float) -> float:
        """``value`` with four digits, which is as many as can matter and can be read, and within the ends."""
        return round(value) if self.whole else min(max(float(f"{value:.4g}"), self.low), self.high)

    def share(self, value: object) -> float:
        """The inverse of :meth:`at`. Raises ``ValueError`` outside the range."""
        if not is_number(value) or not self.low <= value <= self.high or (self.whole and value != int(value)):
            kind = "a whole number" if self.whole else "a number"
            raise ValueError(f"must be {kind} from {self.low:g} to {self.high:g}, got {value!r}")
        if self.log:
            return (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)

    def check(self, value: object) -> None:
        """Raise ``ValueError`` unless ``value`` lies in the range."""
        self.share(value)

    def grid(self, points: int) -> Sequence[KnobValue]:
        """``points`` values, evenly spaced from end to end; whole numbers once each."""
        return list(dict.fromkeys(self.at(i / (points - 1)) for i in range(points)))

    def draw(self, source: Random) -> float:
        return (
            source.randint(int(self.low), int(self.high)) if self.whole and not self.log else self.at(source.random())
        )

    def neighbor(self, value: KnobValue, source: Random) -> float:
        """A tenth of the range up or down, at least to the next whole number, and not beyond its ends."""
        up, share = source.random() < 0.5, self.share(value)
        if share in (0.0, 1.0):
            up = share == 0.0
        moved = self.at(min(max(share + (STEP if up else -STEP), 0.0), 1.0))
        return int(moved) + (1 if up else -1) if self.whole and moved == value else moved


Domain = Options | Interval


def is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
