"""From ``sweep.space`` of a config to a space of trials, and a rehearsal of what it may change."""

from collections.abc import Mapping

from qtrain.convert.layers import find_layers
from qtrain.data.base import VisionData
from qtrain.pipeline.allocate import is_search
from qtrain.pipeline.build_model import build_model, example_input
from qtrain.pipeline.conversion import target_of
from qtrain.settings.component import Component
from qtrain.settings.run_settings import Compose, RunSettings
from qtrain.spec import FULL_PRECISION, Allocation, LayerNames
from qtrain.sweep.bit_widths import BitWidths
from qtrain.sweep.knobs import Bundle, Choice, Knob
from qtrain.sweep.space import Space
from qtrain.utils.errors import ConfigError, as_config_error

OF_THE_SWEEP = (
    "task", "experiment", "name", "run_dir", "output", "resume", "overwrite", "results", "report", "review", "sweep",
    "variants", "select", "predict", "images", "fit.final_test", "data.val_fraction", "allow_targets", "hydra",
)  # fmt: skip
"""Keys that a knob cannot set, since all trials have them from the sweep."""


def make_space(settings: RunSettings, data: VisionData) -> Space:
    """The space of ``settings.sweep.space``, for the model of ``settings`` on the images of ``data``.

    A list of values stands for a choice of them, a mapping of lists for a bundle, and ``null`` takes a knob away.
    """
    knobs = {name: _knob(name, chosen) for name, chosen in settings.sweep.space.items() if chosen is not None}
    layers = LayerNames()
    base: Allocation = {}
    if any(isinstance(knob, BitWidths) for knob in knobs.values()):
        if not settings.quantize.enabled:
            raise ConfigError("sweep.space: has knobs for bits, and quantize.enabled is false; take it away")
        layers = find_layers(build_model(settings.model, data.info), example_input(data.info)).weighted
        with as_config_error("quantize.bits"):
            base = settings.quantize.bits.build()(layers)
    with as_config_error("sweep.space"):
        return Space(knobs, layers=layers, base=base)


def _knob(name: str, chosen: object) -> Knob:
    where = f"sweep.space.{name}"
    with as_config_error(where):
        if isinstance(chosen, list):
            return Choice(options=chosen)
        if isinstance(chosen, Component) and isinstance(knob := chosen.build(), Knob):
            return knob
        if isinstance(chosen, Mapping):
            return Bundle(options=dict(chosen))
    given = chosen.plain if isinstance(chosen, Component) else chosen
    raise ConfigError(
        f"{where}: must be a list of values, a mapping of labels to overrides, or a knob such as "
        f"+knob@{where}=log_uniform, got {given}"
    )


def rehearse_space(settings: RunSettings, space: Space, compose: Compose) -> None:
    """Compose a few trials in which every value of ``space`` occurs that is listed, and both ends of every range.

    ``compose`` makes a trial's config of what it changes. Raises :class:`ConfigError` for what would fail trial after
    trial: a key that is not there, a value of the wrong type, a setting that all trials have from the sweep, bits that
    the runtime they are made for does not compute with.
    """
    model = settings.plain["model"]
    for point in space.covering():
        changes = space.overrides(point)
        for change in changes:
            _check_key(change)
        trial = compose(changes)
        _check_widths(trial, space.layers)
        if trial.plain["model"] != model and space.turns_bits:
            raise ConfigError(
                "sweep.space: changes the model, to whose layers it gives bits by name; sweep over one model at a time"
            )


def _check_widths(settings: RunSettings, layers: LayerNames) -> None:
    target = target_of(settings)
    if target is None or not settings.quantize.enabled or is_search(settings):
        return
    with as_config_error("quantize.bits"):
        found = settings.quantize.bits.build()(layers or LayerNames(("first", "between", "last")))
    for bits in found.values():
        for role, width, known in (
            ("weights", bits.weight, target.weight_bits),
            ("inputs", bits.input, target.input_bits),
        ):
            if max(known) < width < FULL_PRECISION:
                raise ConfigError(
                    f"sweep.space: gives {role} {width} bits, and {target.name} computes with {max(known)} at most, so "
                    f"that they would stay in floating point there; leave {width} out, or take {FULL_PRECISION}"
                )


def _check_key(override: str) -> None:
    group, _, place = override.lstrip("+~").partition("=")[0].partition("@")
    key = place or group
    for taken in OF_THE_SWEEP:
        if key == taken or key.startswith(f"{taken}."):
            raise ConfigError(
                f"sweep.space: {override!r} sets {taken}, which all trials have from the sweep; remove it there"
            )
