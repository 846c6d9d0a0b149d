"""The state of a student's quantizers: metrics of one forward, and which of them are signs of a collapse.

These are pure functions of a model and a batch. :mod:`qtrain.training.callbacks.health` calls them.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qtrain.convert.layers import quant_layers
from qtrain.functional.losses import soft_target_loss
from qtrain.nn import Operand
from qtrain.nn.many_bits import forward_all
from qtrain.quantizers.base import Quantizer
from qtrain.quantizers.wrappers.oscillation import Oscillation, oscillating_share
from qtrain.storage.affine import AffineTensor
from qtrain.storage.base import QTensor
from qtrain.storage.levels import LevelTensor
from qtrain.utils.calls import see_input
from qtrain.utils.eval_mode import evaluating

Codes = tuple[int, Tensor]
"""Bits and codes of a weight, kept for the comparison with the next examination."""


def clipped_fraction(stored: AffineTensor, x: Tensor) -> Tensor:
    """The share of values of ``x`` outside of the quantizer's range, 0-dim: where the error exceeds half a step.

    The error of rounding alone is at most half a step; the tolerance is for float32 with values of up to 16 bits.
    """
    error = (stored.dequantize() - x.float()).abs()
    step = stored.granularity.expand(stored.scale, tuple(x.shape))
    return (error > 0.5 * step + 1e-6 * x.abs()).float().mean()


def clipped_negatives(stored: QTensor, x: Tensor) -> Tensor | None:
    """The share of values of ``x`` that are negative and clipped because no code is below zero, 0-dim.

    ``None`` where the codes reach below zero, or where they are not evenly spaced or levels.
    """
    shape = tuple(x.shape)
    if isinstance(stored, AffineTensor) and stored.low == 0 and stored.zero_point is None and stored.offset is None:
        step = stored.granularity.expand(stored.scale, shape)
    elif isinstance(stored, LevelTensor):
        lowest = torch.where(stored.levels > 0, stored.levels, torch.inf).min()
        step = stored.granularity.expand(lowest * stored.scale, shape)
    else:
        return None
    return ((x < -0.5 * step) & (stored.dequantize() >= 0)).float().mean()


def relative_error(stored: QTensor, x: Tensor) -> Tensor:
    """``|x^ - x|^2 / |x|^2``, 0-dim: the error of quantization relative to the signal's energy."""
    x = x.float()
    return (stored.dequantize() - x).square().sum() / x.square().sum().clamp(min=torch.finfo(torch.float32).tiny)


def dead_levels(stored: QTensor) -> Tensor:
    """The share of unused codes among ``low..high``, 0-dim; ``n`` elements can use at most ``n`` codes."""
    levels = stored.high - stored.low + 1
    used = torch.bincount((stored.codes - stored.low).flatten().to(torch.int64), minlength=levels) > 0
    return 1 - used.sum().float() / min(levels, stored.codes.numel())


def gradient_ratio(quantizer: Quantizer, weight: Tensor) -> Tensor | None:
    """``(|grad s| / |s|) / (|grad w| / |w|)``, 0-dim; ``s`` is all that the quantizer learns, ``w`` the weight.

    LSQ's R (Esser et al. 2020, arXiv 1902.08153, §2.2, eq. 4): near 1, steps and weights learn at the same pace.
    ``None`` where one of the two has no gradient.
    """
    learned = [parameter for parameter in quantizer.parameters() if parameter.grad is not None]
    if not learned or weight.grad is None:
        return None
    size = torch.cat([parameter.detach().flatten().float() for parameter in learned]).norm()
    gradient = torch.cat(
        [parameter.grad.flatten().float() for parameter in learned if parameter.grad is not None]
    ).norm()
    tiny = torch.finfo(torch.float32).tiny
    pace = weight.grad.float().norm() / weight.detach().float().norm().clamp(min=tiny)
    ratio: Tensor = gradient / size.clamp(min=tiny) / pace.clamp(min=tiny)
    return ratio


def agreement(logits: Tensor, teacher_logits: Tensor) -> dict[str, Tensor]:
    """``agreement``, the percentage of samples that both classify alike, and ``teacher_kl``, in nats."""
    same = (logits.argmax(dim=1) == teacher_logits.argmax(dim=1)).float().mean()
    return {"agreement": 100 * same, "teacher_kl": soft_target_loss(logits, teacher_logits, 1.0)}


@dataclass(frozen=True)
class Examination:
    """Metrics by name, as ``error/conv1.weight``; bits and codes of weights by place, as ``conv1.weight``."""

    metrics: dict[str, float]
    bits: dict[str, int]
    codes: dict[str, Codes]


@torch.no_grad()
def examine(
    student: nn.Module,
    image: Tensor,
    *,
    former: Mapping[str, Codes] | None = None,
    teacher_logits: Tensor | None = None,
) -> Examination:
    """The state of each enabled quantizer in ``student``, in a forward of ``image`` (N, C, H, W) in eval mode.

    For each place: ``error/``, the relative error; ``zeros/``, the share of values that become zero; ``dead/``, the
    share of levels that no value has; for evenly spaced codes ``scale/``, the mean scale, and ``clipped/``, the share
    of values outside of the range; ``negative/``, the share of an input's values that are clipped because they are
    negative and no code is (:func:`clipped_negatives`); ``gradient/``, the relative speed of its scale
    (:func:`gradient_ratio`), if there are gradients from the last backward. For weights: ``oscillating/`` if
    oscillations are counted, otherwise ``flipped/``, the share of codes that differ from those of ``former``, an
    earlier examination. With ``teacher_logits`` (N, K) for ``image``: ``agreement`` and ``teacher_kl``.

    Modes are restored, and nothing else changes. All values are read from the device at once.
    """
    metrics: dict[str, Tensor] = {}
    bits: dict[str, int] = {}
    codes: dict[str, Codes] = {}

    def look(place: str, quantizer: Quantizer | None, x: Tensor, weight: Tensor | None) -> QTensor | None:
        if quantizer is None or not quantizer.enabled or f"error/{place}" in metrics:
            return None
        stored = quantizer.quantize(x.float())
        bits[place] = stored.bits
        metrics[f"error/{place}"] = relative_error(stored, x)
        metrics[f"zeros/{place}"] = (stored.dequantize() == 0).float().mean()
        metrics[f"dead/{place}"] = dead_levels(stored)
        if isinstance(stored, AffineTensor):
            metrics[f"scale/{place}"] = stored.scale.float().mean()
            metrics[f"clipped/{place}"] = clipped_fraction(stored, x)
        if place.endswith(".input") and (negative := clipped_negatives(stored, x)) is not None:
            metrics[f"negative/{place}"] = negative
        if weight is not None and (ratio := gradient_ratio(quantizer, weight)) is not None:
            metrics[f"gradient/{place}"] = ratio
        return stored

    def before(name: str, layer: Any, x: Tensor) -> None:
        if isinstance(layer, Operand):
            look(f"{name}.input", layer.input_quantizer, x, None)
            return
        look(f"{name}.input", layer.input_quantizer, x, layer.weight)
        place = f"{name}.weight"
        stored = look(place, layer.weight_quantizer, layer.effective_weight(), layer.weight)
        if stored is None:
            return
        counters = [module for module in layer.weight_quantizer.modules() if isinstance(module, Oscillation)]
        if counters:
            metrics[f"oscillating/{place}"] = oscillating_share(counters[0])
            return
        codes[place] = stored.bits, _compact(stored)
        earlier = (former or {}).get(place)
        if earlier is not None and earlier[0] == stored.bits and earlier[1].shape == stored.codes.shape:
            changed = codes[place][1] != earlier[1].to(stored.codes.device)
            metrics[f"flipped/{place}"] = changed.float().mean()

    layers = quant_layers(student)
    if not layers and teacher_logits is None:
        return Examination({}, {}, {})
    with ExitStack() as hooks, evaluating(student), torch.compiler.set_stance("force_eager"):
        for name, layer in layers.items():
            hooks.enter_context(see_input(layer, partial(before, name, layer)))
        logits = forward_all(student, image)
    if teacher_logits is not None:
        metrics |= agreement(logits, teacher_logits)
    values = torch.stack(list(metrics.values())).tolist() if metrics else []
    return Examination(dict(zip(metrics, values, strict=True)), bits, codes)


def _compact(stored: QTensor) -> Tensor:
    """Codes counted from 0, in the smallest integer type, since they are stored in resume points."""
    codes = stored.codes - stored.low
    return codes.to(torch.uint8) if stored.high - stored.low < 256 else codes.to(torch.int32)


@dataclass(frozen=True)
class Symptom:
    """A sign of a collapse: its ``kind``, its place, as ``conv1.weight``, a description and a remedy."""

    kind: str
    place: str
    says: str
    remedy: str = field(compare=False)


HIGHEST_ERROR, ALL, MOST_DEAD, FAR, MANY, SOME = 1.0, 0.99, 0.5, 100.0, 0.2, 0.01
DEAD_AT = range(3, 7)
"""Numbers of bits for which dead levels are a symptom; with more bits, healthy tensors also have unused levels."""


def symptoms(found: Examination, first_scales: Mapping[str, float], *, images: int, classes: int) -> list[Symptom]:
    """The signs of a collapse in ``found``. ``first_scales`` are the scales of the first examination, by place.

    Agreement is at chance if it is within two standard deviations of ``1 / classes``, for that number of ``images``.
    """
    signs = []
    for place, bits in found.bits.items():
        metrics = {kind: found.metrics.get(f"{kind}/{place}") for kind in _KINDS}
        signs += _place_symptoms(place, bits, metrics, first_scales.get(place))
    share = found.metrics.get("agreement")
    chance = 1 / max(1, classes)
    if share is not None and share / 100 <= chance + 2 * (chance * (1 - chance) / max(1, images)) ** 0.5:
        signs.append(
            Symptom(
                "agreement", "student", f"agrees with its teacher on {share:.1f} % of the images, as guessing would",
                "lower the learning rate, check teacher.mean and teacher.std, or begin with more bits",
            )
        )  # fmt: skip
    return signs


_KINDS = ("error", "zeros", "clipped", "dead", "scale", "oscillating", "negative")


def _place_symptoms(
    place: str, bits: int, metrics: Mapping[str, float | None], first_scale: float | None
) -> list[Symptom]:
    layer, _, part = place.rpartition(".")
    slower = "lower fit.scale_lr"
    start = f"calibrate it anew (quantize.{part}.init=range, another quantize.{part}_observer)"
    more = (
        f"give it more bits (+policy@quantize.policies.more=policy quantize.policies.more.layers=[{layer}] "
        f"quantize.policies.more.{part}_bits={min(16, 2 * bits)})"
    )
    dampen = "dampen it (quantizer@quantize.weight=oscillation with a dampening or a threshold)"
    below = "take inputs whose range may reach below zero (quantizer@quantize.input=lsq_plus)"
    error, zeros, clipped, dead, scale, oscillating, negative = (metrics[kind] for kind in _KINDS)
    signs = []

    def sign(kind: str, says: str, *remedies: str) -> None:
        signs.append(Symptom(kind, place, says, ", or ".join(remedies)))

    if error is not None and error > HIGHEST_ERROR and bits > 1:  # a sign alone has no scale
        sign("error", f"relative error {error:.3g}: rounding changes more than the signal's own energy", slower, more)
    if zeros == 1 and error is not None and error > 0:
        sign("zeros", "all values round to zero", slower, start, more)
    if clipped is not None and clipped >= ALL:
        sign("clipped", f"{100 * clipped:.0f} % of the values are clipped", slower, start)
    if dead is not None and dead > MOST_DEAD and bits in DEAD_AT:
        sign("dead", f"{100 * dead:.0f} % of its {2**bits} levels are never used", slower, start)
    if scale and first_scale and not 1 / FAR <= scale / first_scale <= FAR:
        sign("scale", f"scale {scale:.3g}, at the first look {first_scale:.3g}", slower, start)
    if oscillating is not None and oscillating > MANY:
        sign("oscillating", f"{100 * oscillating:.0f} % of the weights oscillate", dampen, slower)
    if negative is not None and negative > SOME:
        says = f"{100 * negative:.0f} % of the values are negative and clipped to 0; calibration saw no negative ones"
        sign("negative", says, "calibrate on more images (quantize.calibration_batches)", below)
    return signs
