"""A point of a space with some of its knobs changed: how searches go from one trial to the next."""

from random import Random

from qtrain.sweep.domains import Domain, KnobValue
from qtrain.sweep.space import Point, Space


def mutate(space: Space, point: Point, source: Random, *, change: float, resample: float) -> Point:
    """``point`` with each of its knobs changed with probability ``change``, one at least where one can be.

    A knob that changes is drawn anew with probability ``resample``, otherwise moved to a neighboring value. One that
    only now has its conditions met is drawn.
    """
    sure = source.choice(sorted(point))

    def pick(name: str, domain: Domain) -> KnobValue:
        if name not in point:
            return domain.draw(source)
        if name != sure and source.random() >= change:
            return point[name]
        if source.random() < resample:
            return domain.draw(source)
        return domain.neighbor(point[name], source)

    return space.choose(pick)
