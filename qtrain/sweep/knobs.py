"""What a sweep may turn: one setting, a bundle of settings, or (``bit_widths.py``) the bits of layers."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast, final

from qtrain.sweep.domains import Domain, Interval, KnobValue, KnobValues, Options

When = Mapping[str, Sequence[object]]
"""Name of another knob -> values of it with which a knob counts. With any other the knob keeps out."""

Spellable: TypeAlias = "bool | int | float | str | Sequence[Spellable] | Mapping[str, Spellable] | None"
"""What can stand to the right of ``=`` in an override."""

BitChanges = Mapping[str, tuple[int | None, int | None]]
"""Layer -> weight and input bits; ``None`` leaves one as it is."""

_PLAIN = re.compile(r"[A-Za-z_][\w.@/-]*")
_WORDS = ("true", "false", "null", "nan", "inf")


@dataclass(frozen=True)
class Effect:
    """What a knob's value changes in a config: overrides as one would type them, and bits of layers."""

    overrides: Sequence[str] = ()
    bits: BitChanges = field(default_factory=dict)


class Knob(ABC):
    """Something that differs between trials. It has one parameter or, as bits of layers, several.

    ``when`` switches it on by the values of other knobs; all of its conditions must hold.
    """

    def __init__(self, when: When | None) -> None:
        self.when: When = when or {}
        for name, values in self.when.items():
            if isinstance(values, str) or not values:
                raise ValueError(f"{self._owner}: when.{name} must be a list of values, got {values!r}")

    @property
    def _owner(self) -> str:
        return type(self).__name__

    @abstractmethod
    def domains(self, layers: Sequence[str]) -> dict[str, Domain]:
        """What each parameter can be, by what its name adds to the knob's: nothing where there is only one.

        ``layers`` are names of the model's quantizable layers in the order in which they run.
        """

    @abstractmethod
    def effect(self, name: str, values: KnobValues, layers: Sequence[str]) -> Effect:
        """What ``values``, by the keys of :meth:`domains`, change for a knob called ``name``."""


class KeyKnob(Knob):
    """A knob that sets one key of the config: ``key``, or its own name where that is not given."""

    def __init__(self, *, domain: Domain, key: str | None, when: When | None) -> None:
        super().__init__(when)
        self.domain, self.key = domain, key

    @final
    def domains(self, layers: Sequence[str]) -> dict[str, Domain]:
        return {"": self.domain}

    @final
    def effect(self, name: str, values: KnobValues, layers: Sequence[str]) -> Effect:
        return Effect([f"{self.key or name}={spelled(values[''])}"])


@final
class Choice(KeyKnob):
    """One of ``options``; for a group such as ``objective`` the names of its files."""

    def __init__(self, *, options: Sequence[Any], key: str | None = None, when: When | None = None) -> None:
        super().__init__(domain=_options("Choice", options), key=key, when=when)


@final
class UniformRange(KeyKnob):
    """A number from ``low`` to ``high``, all equally likely."""

    def __init__(self, *, low: float, high: float, key: str | None = None, when: When | None = None) -> None:
        super().__init__(domain=_interval("UniformRange", Interval(float(low), float(high))), key=key, when=when)


@final
class LogUniformRange(KeyKnob):
    """A number from ``low`` to ``high`` whose logarithm is uniform: for rates and decays."""

    def __init__(self, *, low: float, high: float, key: str | None = None, when: When | None = None) -> None:
        super().__init__(
            domain=_interval("LogUniformRange", Interval(float(low), float(high), log=True)), key=key, when=when
        )


@final
class IntegerRange(KeyKnob):
    """A whole number from ``low`` to ``high``, both among them; with ``log`` small ones are likelier."""

    def __init__(
        self, *, low: int, high: int, log: bool = False, key: str | None = None, when: When | None = None
    ) -> None:
        super().__init__(domain=_interval("IntegerRange", Interval(low, high, log, whole=True)), key=key, when=when)


@final
class Bundle(Knob):
    """One of several lists of overrides, each under a label: schedules, stages, a method with its own settings."""

    def __init__(self, *, options: Mapping[str, Sequence[str]], when: When | None = None) -> None:
        super().__init__(when)
        for label, overrides in options.items():
            if isinstance(overrides, str) or not all(isinstance(override, str) for override in overrides):
                raise ValueError(
                    f"Bundle: options.{label} must be a list of overrides such as [fit.epochs=2], got {overrides!r}"
                )
        self.options = options
        self.domain = _options("Bundle", list(options))

    def domains(self, layers: Sequence[str]) -> dict[str, Domain]:
        return {"": self.domain}

    def effect(self, name: str, values: KnobValues, layers: Sequence[str]) -> Effect:
        return Effect(self.options[cast(str, values[""])])


def spelled(value: Spellable) -> str:
    """``value`` as it stands to the right of ``=`` in an override.

    >>> spelled(0.001), spelled(None), spelled([2, "a b"]), spelled({"layer1.0.*": [3, 4]})
    ('0.001', 'null', "[2,'a b']", '{layer1.0.*:[3,4]}')
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{spelled(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ",".join(map(spelled, value)) + "]"
    if _PLAIN.fullmatch(value) and value.lower() not in _WORDS:
        return str(value)
    # Hydra's grammar: backslashes count only before a quote or at the end, where they are doubled.
    return "'" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), value) + "'"


def _options(owner: str, given: Sequence[KnobValue]) -> Options:
    values = tuple(given)
    if not values:
        raise ValueError(f"{owner}: options must not be empty; leave the knob out, or give values")
    for place, value in enumerate(values):
        if value in values[:place]:
            raise ValueError(f"{owner}: options must differ, got {value!r} twice")
    return Options(values)


def _interval(owner: str, interval: Interval) -> Interval:
    low, high = interval.low, interval.high
    if not low < high:
        raise ValueError(f"{owner}: low must be below high, got low={low:g} and high={high:g}")
    if interval.log and low <= 0:
        raise ValueError(f"{owner}: low must be above 0, where logarithms begin, got {low:g}")
    return interval
