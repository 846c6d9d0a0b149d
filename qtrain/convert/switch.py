"""Changing the bits of a converted model in place, with ranges that keep the quantized values where they were.

With more bits, the step is halved for each bit. So every old value is still a value of the quantizer, and rounding
moves no value by more than half an old step. With fewer bits, a search finds the range that moves the quantized values
least, ``min_f |Q_new(x; f) - Q_old(x)|^2``, for each granularity group separately.
"""

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from qtrain.convert.layers import quant_layers, quantizers_of, switched_off
from qtrain.convert.plan import MakeObserver, observer_for
from qtrain.nn import Operand, QuantLayer
from qtrain.observers.base import Observer
from qtrain.observers.squared_error import SquaredError
from qtrain.quantizers.base import Quantizer
from qtrain.quantizers.hooks import Rescalable
from qtrain.quantizers.wrappers.wrapper import innermost
from qtrain.spec import FULL_PRECISION, Allocation
from qtrain.storage.affine import AffineTensor
from qtrain.storage.levels import LevelTensor
from qtrain.utils.calls import see_input
from qtrain.utils.errors import errors_of
from qtrain.utils.eval_mode import evaluating
from qtrain.utils.suggestions import close_matches

log = logging.getLogger(__name__)

LOWEST, HIGHEST, PER_OCTAVE = -4, 1, 12
"""Factors that the search tries: from 1/16 to 2 times that of the plain rule, 12 for each doubling."""

REFINEMENTS = 3


class Change(NamedTuple):
    """A quantizer and the bits that it is to have."""

    layer: str
    role: Literal["weight", "input"]
    quantizer: Quantizer
    bits: int


@torch.no_grad()
def switch_bits_(model: nn.Module, bits: Allocation, images: Tensor | None = None) -> dict[nn.Parameter, Tensor]:
    """Change the layers that ``bits`` names to these bits, in place, with ranges that keep their quantized values.

    ``images`` (N, C, H, W), a few dozen, are run in eval mode with the old bits, to see what each input quantizer
    quantizes. Without images, and for a layer that they do not reach, inputs follow the plain rule: the step times
    ``2^(old - new)``. If a quantizer has no range of its own, only its bits change, which is logged.

    Returns, for each changed parameter, the factor by which its gradient changes, for the optimizer's moments. Raises
    ``ValueError`` with the layer's name, before anything is changed, for a layer that does not exist or is not
    quantized, and for bits that a quantizer cannot have.
    """
    changes = asked_changes(model, bits)
    factors: dict[Change, Tensor | None] = {}
    for change in changes:
        x = _weight(model, change) if change.role == "weight" else None
        with errors_of(f"layer {change.layer!r}"):
            factors[change] = fitted_factor(change.quantizer, x, change.bits)
    inputs = [change for change in changes if change.role == "input" and change.bits < int(change.quantizer.bits)]
    if images is not None and inputs:

        def look(change: Change, x: Tensor) -> None:
            # If a layer is called twice, the last call counts.
            factors[change] = fitted_factor(change.quantizer, x, change.bits)

        with _looking(model, inputs, look):
            model(images)

    gradients: dict[nn.Parameter, Tensor] = {}
    without = []
    for change, factor in factors.items():
        change.quantizer.set_range_(bits=change.bits, signed=bool(change.quantizer.signed))
        core = innermost(change.quantizer)
        if factor is not None and isinstance(core, Rescalable):
            gradients.update(core.rescale_(factor))
        else:
            without.append(type(core).__name__)
    for name in sorted(set(without)):
        log.info("%s has no range of its own that a change of bits could keep: its values follow from the bits", name)
    return gradients


@torch.no_grad()
def calibrate_at_(model: nn.Module, bits: Allocation, images: Tensor, observer: MakeObserver) -> None:
    """Change the layers that ``bits`` names to these bits, in place, and calibrate the changed quantizers again.

    For a start at more bits than the model was calibrated for: a range for few bits clips values that more bits could
    represent. Inputs are observed in full precision, as in :func:`qtrain.convert.calibrate.calibrate`. Raises as
    :func:`switch_bits_` does.
    """
    changes = asked_changes(model, bits)
    if not changes:
        return
    for change in changes:
        with errors_of(f"layer {change.layer!r}"):
            copy.deepcopy(change.quantizer).set_range_(bits=change.bits, signed=bool(change.quantizer.signed))
    seen: dict[Change, Observer] = {c: observer_for(c.quantizer, observer) for c in changes}
    for change in changes:
        change.quantizer.set_range_(bits=change.bits, signed=bool(change.quantizer.signed))
        if change.role == "weight":
            seen[change].update(_weight(model, change))
    inputs = [change for change in changes if change.role == "input"]
    with switched_off(quantizers_of(model).values()), _looking(model, inputs, lambda c, x: seen[c].update(x)):
        model(images)
    for change in changes:
        if seen[change].shape is None:
            raise ValueError(f"layer {change.layer!r}: saw no image, so that its input cannot be calibrated")
        observed = seen[change].observed(change.bits)
        tensor = _weight(model, change) if change.role == "weight" else None
        change.quantizer.calibrate_(observed._replace(tensor=tensor))


def asked_changes(model: nn.Module, bits: Allocation) -> list[Change]:
    """The quantizers of ``model`` whose bits differ from those in ``bits``, each once; raises as :func:`switch_bits_`.

    Layers with one weight have one quantizer for it, and a target lets layers that read one tensor share theirs. Such
    layers must get the same bits.
    """
    layers = quant_layers(model)
    changes: list[Change] = []
    sharing: dict[Quantizer, list[str]] = {}
    for name, layer in layers.items():
        for shared in (layer.weight_quantizer, layer.input_quantizer):
            if shared is not None:
                sharing.setdefault(shared, []).append(name)
    for name, (weight, input) in bits.items():
        if name not in layers:
            close = close_matches(name, layers)
            raise ValueError(f"switch_bits_: {name!r} is not a quantized layer of this model{close}")
        asked: list[tuple[Literal["weight", "input"], Quantizer | None, int]] = [
            ("weight", layers[name].weight_quantizer, weight),
            ("input", layers[name].input_quantizer, input),
        ]
        for role, quantizer, width in asked:
            if (quantizer is None) != (width == FULL_PRECISION):
                has = "in full precision" if quantizer is None else f"quantized to {int(quantizer.bits)} bits"
                raise ValueError(
                    f"switch_bits_: the {role} of layer {name!r} is {has} and cannot become {width} bits; "
                    "convert the model anew"
                )
            if quantizer is None or int(quantizer.bits) == width:
                continue
            others = [other for other in sharing.get(quantizer, []) if other != name]
            if any(getattr(bits[other], role) != width if other in bits else True for other in others):
                what = "its weight" if role == "weight" else "the quantizer of the tensor that it reads"
                raise ValueError(
                    f"switch_bits_: layer {name!r} has {what} in common with {', '.join(others)}; give all of them "
                    f"the same {role} bits, not {width} for it alone"
                )
            if not any(change.quantizer is quantizer for change in changes):
                changes.append(Change(name, role, quantizer, width))
    return changes


@torch.no_grad()
def fitted_factor(quantizer: Quantizer, x: Tensor | None, bits: int) -> Tensor | None:
    """The factor, of the state shape, for the range of ``quantizer`` once it has ``bits``.

    ``None`` where it has no range of its own. With more bits, or without ``x``, the values to be quantized, it follows
    the plain rule: steps in the ratio ``2^(old - new)``, levels under the same clip. Otherwise it has the least squared
    error to the old quantized values, among factors around that of the plain rule and that of a new calibration, then
    refined; it is no worse than either. Raises ``ValueError`` where the quantizer cannot have these bits. ``quantizer``
    is not changed.
    """
    trial = copy.deepcopy(quantizer).eval()
    trial.enabled = True
    core = innermost(trial)
    before, old_bits, signed = None if x is None else trial(x).float(), int(trial.bits), bool(trial.signed)
    old = _unit(core) if isinstance(core, Rescalable) else None
    trial.set_range_(bits=bits, signed=signed)
    if old is None or not isinstance(core, Rescalable):
        return None
    unit, kind = old
    wanted = unit * 2.0 ** (old_bits - bits) if kind is AffineTensor else unit
    now = _unit(core)[0]
    plain = wanted / now
    if x is None or before is None or bits >= old_bits or not x.numel():
        return plain

    start = {name: tensor.clone() for name, tensor in trial.state_dict().items()}

    def error(factor: Tensor) -> Tensor:
        trial.load_state_dict(start)
        core.rescale_(factor)
        off = trial(x).float() - before
        return trial.granularity.flatten(off.square()).sum(dim=1, dtype=torch.float64).reshape(factor.shape)

    best, least = plain, error(plain)
    for factor in [*_recalibrated(trial, core, x, now, start), *(plain * r for r in _grid(LOWEST, HIGHEST))]:
        best, least = _better(best, least, factor, error(factor))
    for finer in range(1, REFINEMENTS + 1):
        width = 1 / (PER_OCTAVE * 4 ** (finer - 1))
        for factor in [best * 2.0 ** (width * i / 4) for i in (-3, -2, -1, 1, 2, 3)]:
            best, least = _better(best, least, factor, error(factor))
    return best


def _better(best: Tensor, least: Tensor, factor: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    return torch.where(error < least, factor, best), torch.minimum(error, least)


def _grid(low: int, high: int) -> list[float]:
    return [2.0 ** (i / PER_OCTAVE) for i in range(low * PER_OCTAVE, high * PER_OCTAVE + 1)]


def _recalibrated(
    trial: Quantizer, core: Quantizer, x: Tensor, now: Tensor, start: dict[str, Tensor]
) -> Iterator[Tensor]:
    """The factor by which a new calibration on ``x`` would change the range, unless it would change its sign."""
    trial.load_state_dict(start)
    signed = bool(trial.signed)
    observer = observer_for(trial, SquaredError)
    observer.update(x)
    observed = observer.observed(int(trial.bits))
    trial.calibrate_(observed._replace(tensor=x if trial.spec.is_weight else None))
    if bool(trial.signed) == signed:
        yield _unit(core)[0] / now


def _unit(quantizer: Quantizer) -> tuple[Tensor, type]:
    """The number that scales all values of ``quantizer``, float32 of the state shape: its step, or its clip."""
    stored = quantizer.quantize(torch.zeros(quantizer.spec.shape, device=quantizer.bits.device))
    assert isinstance(stored, AffineTensor | LevelTensor), "whoever has rescale_ stores a scale"
    return stored.scale.float(), type(stored)


def _weight(model: nn.Module, change: Change) -> Tensor:
    layer = model.get_submodule(change.layer)
    assert isinstance(layer, QuantLayer)
    assert not isinstance(layer, Operand)
    return layer.effective_weight().detach()


@contextmanager
def _looking(model: nn.Module, changes: list[Change], look: Callable[[Change, Tensor], None]) -> Iterator[None]:
    """Inside, ``model`` is in eval mode, and each forward calls ``look`` with the input of each change's layer."""
    with ExitStack() as hooks, evaluating(model), torch.compiler.set_stance("force_eager"):
        for change in changes:
            hooks.enter_context(see_input(model.get_submodule(change.layer), partial(look, change)))
        yield
