"""A space of trials: named knobs, conditions between them, and what a point of it changes in a config."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import TypeAlias, final

from qtrain.allocate.from_file import FromFile
from qtrain.spec import FULL_PRECISION, Allocation, LayerBits, LayerNames
from qtrain.sweep.bit_widths import BitWidths
from qtrain.sweep.domains import Domain, KnobValue, KnobValues
from qtrain.sweep.first_last_bits import FirstLastBits
from qtrain.sweep.knobs import Knob, spelled
from qtrain.utils.errors import errors_of
from qtrain.utils.suggestions import did_you_mean

Point: TypeAlias = dict[str, KnobValue]
"""Parameter -> its value, of the parameters that count; plain values, as JSON has them."""

Given: TypeAlias = "Mapping[str, KnobValue | KnobValues]"
"""Knob -> its value, or the values of some of its parameters by what their names add to the knob's."""

MANUAL = "allocate@quantize.bits=manual"


@final
class Space:
    """All trials that ``knobs`` allow, for a model of ``layers`` that has the bits ``base`` where no knob says more.

    A knob's parameter is called as the knob; of several, each has the layer's or block's name behind it:
    ``widths.layer1.0``. Layers without ``base`` are in full precision. Raises ``ValueError`` for conditions that cannot
    be.
    """

    def __init__(
        self, knobs: Mapping[str, Knob], *, layers: Sequence[str] = (), base: Allocation | None = None
    ) -> None:
        if not knobs:
            raise ValueError(
                "the space is empty, so that there is nothing to sweep over; add a knob, for instance "
                "+sweep.space.objective=[soft,hard], or +knob@sweep.space.widths=bit_widths"
            )
        self.knobs = _in_order(knobs)
        self.layers = LayerNames.of(layers)
        self._base = {name: LayerBits(FULL_PRECISION, FULL_PRECISION) for name in layers} | dict(base or {})
        self._domains: dict[str, dict[str, Domain]] = {}
        for name, knob in self.knobs.items():
            with errors_of(name):
                self._domains[name] = knob.domains(self.layers)
        self.parameters: dict[str, Domain] = {}
        for name, domains in self._domains.items():
            for suffix, domain in domains.items():
                if name + suffix in self.parameters:
                    raise ValueError(
                        f"{name}: {name + suffix!r} is the name of another knob as well; call one otherwise"
                    )
                self.parameters[name + suffix] = domain
        for name, knob in self.knobs.items():
            for other, values in knob.when.items():
                self._check_condition(name, other, values)

    @property
    def turns_bits(self) -> bool:
        """Whether points give bits to the layers of one model by their names."""
        return any(isinstance(knob, BitWidths) for knob in self.knobs.values())

    def choose(self, pick: Callable[[str, Domain], KnobValue]) -> Point:
        """The point that ``pick`` makes by choosing a value for each parameter that counts, one after the other."""
        point: Point = {}
        for name in self.knobs:
            if self._counts(name, point):
                point |= {name + suffix: pick(name + suffix, domain) for suffix, domain in self._domains[name].items()}
        return point

    def overrides(self, point: KnobValues) -> list[str]:
        """What ``point`` changes, as one would type it. Equal changes are equal lists."""
        changed: list[str] = []
        bits: dict[str, LayerBits] = {}
        point = self.choose(lambda name, domain: point[name])  # without what does not count
        # Where the bits of the ends are a knob of their own, no other has a say in them.
        for name, knob in sorted(self.knobs.items(), key=lambda named: isinstance(named[1], FirstLastBits)):
            if not self._counts(name, point):
                continue
            effect = knob.effect(name, {suffix: point[name + suffix] for suffix in self._domains[name]}, self.layers)
            changed += effect.overrides
            for layer, (weight, input) in effect.bits.items():
                before = bits.get(layer, self._base[layer])
                bits[layer] = LayerBits(weight or before.weight, input or before.input)
        if bits:
            pairs = {layer: list(bits.get(layer, self._base[layer])) for layer in self.layers}
            changed += [MANUAL, f"++quantize.bits.layers={spelled(pairs)}"]
        return changed

    def completed(self, given: Given) -> Point:
        """``given`` by parameter: a value for a knob of several is that of all of them, a mapping that of some.

        Raises ``ValueError`` for a name or a value that the space does not have.
        """
        point: Point = {}
        for name, value in given.items():
            if name not in self.knobs:
                raise ValueError(f"there is no knob {name!r} in the space{did_you_mean(name, self.knobs)}")
            suffixes = self._domains[name]
            knob = self.knobs[name]
            if isinstance(value, str) and isinstance(knob, BitWidths):
                with errors_of(name):
                    bits = FromFile(path=value, weight=FULL_PRECISION, input=FULL_PRECISION)(self.layers)
                    values = knob.values_of(bits, self.layers)
                chosen: dict[str, KnobValue] = {**values}
            elif isinstance(value, Mapping):
                chosen = {f".{part}": inner for part, inner in value.items()}
            else:
                chosen = dict.fromkeys(suffixes, value)
            for suffix, inner in chosen.items():
                if suffix not in suffixes:
                    parts = [known.removeprefix(".") for known in suffixes]
                    raise ValueError(f"{name}: there is no {suffix.removeprefix('.')!r}{did_you_mean(suffix, parts)}")
                with errors_of(name + suffix):
                    suffixes[suffix].check(inner)
                point[name + suffix] = inner
        return point

    def combinations(self, points: int) -> Iterator[Point]:
        """Every point once, where a range counts as ``points`` values."""
        return self._from(list(self.knobs), {}, points)

    def count(self, points: int) -> int:
        """How many :meth:`combinations` there are, without making them."""
        return self._count(list(self.knobs), {}, points)

    def covering(self) -> Iterator[Point]:
        """A few points in which every listed value and both ends of every range occur, where conditions let them."""
        unseen = {name: list(domain.grid(2)) for name, domain in self.parameters.items()}
        patience = max(map(len, unseen.values()))
        idle = turn = 0

        def pick(name: str, domain: Domain) -> KnobValue:
            """What was not seen; then each value in turn, so that it lets others meet their conditions."""
            values = domain.grid(2)
            return unseen[name].pop(0) if unseen[name] else values[turn % len(values)]

        while idle < patience:
            before = sum(map(len, unseen.values()))
            point = self.choose(pick)
            turn, idle = turn + 1, idle + 1
            if sum(map(len, unseen.values())) < before:
                idle = 0
                yield point

    def _counts(self, name: str, point: KnobValues) -> bool:
        """Whether the conditions of ``name`` hold; one on a knob that does not count itself does not."""
        return all(other in point and point[other] in values for other, values in self.knobs[name].when.items())

    def _from(self, names: Sequence[str], point: Point, points: int) -> Iterator[Point]:
        if not names:
            yield dict(point)
            return
        for own in self._own(names[0], point, points):
            yield from self._from(names[1:], {**point, **own}, points)

    def _own(self, name: str, point: Point, points: int) -> Iterable[Point]:
        """Every choice for the knob ``name`` alone, an empty one where it does not count."""
        found: list[Point] = [{}]
        if self._counts(name, point):
            for suffix, domain in self._domains[name].items():
                found = [{**own, name + suffix: value} for own in found for value in domain.grid(points)]
        return found

    def _count(self, names: Sequence[str], point: Point, points: int) -> int:
        if not names:
            return 1
        name, rest = names[0], names[1:]
        if any(name in self.knobs[other].when for other in rest):
            return sum(self._count(rest, {**point, **own}, points) for own in self._own(name, point, points))
        sizes = (len(domain.grid(points)) for domain in self._domains[name].values())
        return (prod(sizes) if self._counts(name, point) else 1) * self._count(rest, point, points)

    def _check_condition(self, name: str, other: str, values: Sequence[object]) -> None:
        where = f"{name}.when.{other}"
        if other not in self.parameters:
            raise ValueError(f"{where}: has bits of several layers, and so no one value to depend on")
        with errors_of(where):
            for value in values:
                self.parameters[other].check(value)


def _in_order(knobs: Mapping[str, Knob]) -> dict[str, Knob]:
    """``knobs`` as they are given, but each behind those that its conditions name."""
    ordered: dict[str, Knob] = {}
    left = dict(knobs)
    for name, knob in knobs.items():
        for other in knob.when:
            if other not in knobs:
                raise ValueError(f"{name}.when: there is no knob {other!r} in the space{did_you_mean(other, knobs)}")
    while left:
        ready = [name for name, knob in left.items() if all(other in ordered for other in knob.when)]
        if not ready:
            raise ValueError(f"{', '.join(left)}: their conditions depend on each other; remove one")
        for name in ready:
            ordered[name] = left.pop(name)
    return ordered
