"""What to try where calibration alone loses much accuracy, with the overrides to type."""

from collections.abc import Iterator

from qtrain.settings.component import Component
from qtrain.settings.run_settings import QuantizeSettings, RunSettings

MUCH = 10.0
"""Points of accuracy. Above this fall something does not fit; below it, training is the usual remedy."""

EVEN_STEPS = ("Affine", "LSQ", "LSQPlus")
"""Quantizers whose rounding can be learned, and whose ranges an observer decides."""


def calibration_advice(settings: RunSettings, *, full_precision: float | None, calibrated: float | None) -> str | None:
    """One line about a student that lost more than :data:`MUCH` points of top-1 (in percent) by being calibrated.

    ``None`` where it lost less, where one of the two is not known, and where all that helps is in use.
    """
    if full_precision is None or calibrated is None or full_precision - calibrated <= MUCH:
        return None
    remedies = "; ".join(_remedies(settings.quantize))
    if not remedies:
        return None
    fall = full_precision - calibrated
    when = "calibrated" if settings.task == "calibrate" else "calibrated only, before training"
    return (
        f"{when}, the student has {calibrated:.2f} %, {fall:.1f} points less than in full precision; "
        f"what usually helps: {remedies}"
    )


def _remedies(q: QuantizeSettings) -> Iterator[str]:
    """What ``q`` does not use yet, as ``override (what it does)``, the likeliest first."""
    weight, input = _innermost(q.weight), _innermost(q.input)
    if starts := [f"{one.key}.init=range" for one in (weight, input) if one.get("init") == "mean_abs"]:
        yield f"{' '.join(starts)} (steps start from what the observer saw)"
    granularity = weight.get("granularity")
    if isinstance(granularity, Component) and granularity.kind == "PerTensor":
        yield f"granularity@{weight.key}.granularity=channel (a scale for each channel)"
    if input.kind in EVEN_STEPS:
        other = "squared_error" if q.input_observer.kind != "SquaredError" else "percentile"
        yield f"observer@quantize.input_observer={other} (another observer)"
    if q.rounding is None and weight.kind in EVEN_STEPS:
        learned = "brecq" if q.calibration == "images" else "squant"
        yield f"rounding@quantize.rounding={learned} (learned rounding)"


def _innermost(quantizer: Component) -> Component:
    """The quantizer inside all wrappers of ``quantizer``."""
    inner = quantizer.get("quantizer")
    return _innermost(inner) if isinstance(inner, Component) else quantizer
