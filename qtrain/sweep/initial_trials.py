"""Which trials are those that a sweep was told to begin with. They are never stopped: others are compared with
them."""

from collections.abc import Mapping

from qtrain.settings.run_settings import RunSettings
from qtrain.sweep.domains import KnobValues
from qtrain.sweep.space import Given


def is_start(settings: RunSettings, id: str, knobs: KnobValues) -> bool:
    """Whether trial ``id`` of the sweep ``settings`` is one of ``settings.sweep.start``.

    These come first, but a search may leave some out: a grid those that are none of its points, a small population
    those that it has no room for.
    """
    given = settings.sweep.start
    return int(id) <= len(given) and any(_agrees(knobs, own) for own in given)


def _agrees(knobs: KnobValues, given: Given) -> bool:
    """Whether ``knobs`` have the values ``given``, as far as they count; one for a knob of several is that of all."""
    for name, value in given.items():
        if isinstance(value, str) and name not in knobs:
            continue  # the bits of a file; the trial's number says the rest
        for knob, own in knobs.items():
            part = knob.removeprefix(f"{name}.")
            if knob == name or part != knob:
                wanted = value.get(part, own) if isinstance(value, Mapping) else value
                if own != wanted:
                    return False
    return True
