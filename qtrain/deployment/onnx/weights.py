"""Weights and biases as the codes of an ONNX file: whole numbers with a scale and a zero point for each output."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qtrain.spec import Granularity
from qtrain.storage.affine import AffineTensor
from qtrain.storage.base import QTensor, of_groups
from qtrain.storage.levels import LevelTensor
from qtrain.storage.planes import BitPlanes

_ROOM = 2**30
"""Largest code of a bias, half of what 32 bits hold, so that products can be added to it."""

_NEARLY = 1e-4
"""How far from a whole number of halves an offset may be: float32's rounding."""

_BYTE = 127
"""Largest code of a weight of levels."""

_LARGEST = 64
"""Largest code of a weight of few bits: two products of such codes with 8 bits fit the 16 bits in which x86 processors
without VNNI add them."""


@dataclass(frozen=True)
class WeightCodes:
    """A weight (O, I, ...) as ``(codes - zero_point) scale``: ``codes`` int64, the others (O,) for each output."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    @property
    def uniform(self) -> bool:
        """Whether all outputs have one scale and one zero point."""
        return bool((self.scale == self.scale[0]).all()) and bool((self.zero_point == self.zero_point[0]).all())


def weight_codes(stored: QTensor) -> WeightCodes | None:
    """The codes of a stored weight, ``None`` where it is not evenly spaced with at most a scale for each output.

    Signs, and levels that are multiples of the smallest, are evenly spaced too.
    """
    if not isinstance(stored, AffineTensor | BitPlanes | LevelTensor):
        return None
    zero = None
    if isinstance(stored, AffineTensor):
        if stored.bits > 8:
            return None
        codes, scale, zero = stored.codes, stored.scale, stored.zero_point
        if stored.offset is not None and bool(stored.offset.any()):
            # An offset of whole halves of a step, as of DoReFa's -1, is a zero point of codes that are twice as large.
            halves = -2 * stored.offset / scale
            if stored.bits > 7 or zero is not None or bool(((halves - halves.round()).abs() > _NEARLY).any()):
                return None
            codes, scale, zero = 2 * codes.to(torch.int64), scale / 2, halves.round()
    elif isinstance(stored, LevelTensor):
        unit = stored.levels.abs()[stored.levels != 0].min()
        steps = (stored.levels / unit).round()
        codes, scale = steps[stored.codes.to(torch.int64)], stored.scale * unit
        if int(steps.abs().max()) > _BYTE or not torch.equal(stored.levels, steps * unit):
            return None
    else:
        if stored.bits != 1 or stored.unsigned:
            return None
        codes = 2 * stored.codes[0] - 1
        scale = torch.ones((), device=codes.device) if stored.scale is None else stored.scale[0]
    of_outputs = [_of_outputs(state, stored.granularity, tuple(codes.shape)) for state in (scale, zero)]
    if of_outputs[0] is None or (of_outputs[1] is None and zero is not None):
        return None
    scale, zero = of_outputs[0].float(), of_outputs[1]
    zero = torch.zeros_like(scale) if zero is None else zero
    return WeightCodes(codes.to(torch.int64), scale, zero.to(torch.int64))


def _of_outputs(state: Tensor | None, granularity: Granularity, shape: tuple[int, ...]) -> Tensor | None:
    """A scale or zero point of a weight of ``shape`` (O, I, ...) as (O,), ``None`` where an output has several."""
    if state is None:
        return None
    rows = granularity.expand(of_groups(state, granularity, shape), shape).expand(shape).flatten(1)
    return rows[:, 0].clone() if bool((rows == rows[:, :1]).all()) else None


def scaled(weight: WeightCodes, factor: Tensor) -> WeightCodes:
    """``weight`` with each output channel multiplied by ``factor`` (O,): in the scale, and its sign in the codes."""
    sign = torch.where(factor < 0, -1, 1)
    codes = weight.codes * sign.reshape(-1, *(1 for _ in weight.codes.shape[1:]))
    return WeightCodes(codes, weight.scale * factor.abs(), weight.zero_point * sign)


def finer(weight: WeightCodes) -> WeightCodes:
    """``weight`` in codes that are larger by a power of two, as far as :data:`_LARGEST` goes.

    The values stay what they are. The bias is rounded to multiples of the product of the two scales, which for few bits
    is coarse beside the steps of the next layer's input; in 8 bits, where the file stores the codes, there is room.
    """
    reach = max(1, int(torch.maximum(weight.codes.abs().max(), weight.zero_point.abs().max())))
    factor = 1
    while 2 * factor * reach <= _LARGEST:
        factor *= 2
    return WeightCodes(weight.codes * factor, weight.scale / factor, weight.zero_point * factor)


def with_room_for(weight: WeightCodes, bias: Tensor) -> WeightCodes:
    """``weight`` whose scales are at least so large that ``bias`` (O,), in units of the input's scale, fits 32 bits.

    Only channels that batch norm has switched off have smaller ones; what their weights add is lost in the bias.
    """
    least = (bias / _ROOM).clamp(min=torch.finfo(torch.float32).tiny)
    scale = torch.maximum(weight.scale, least)
    ratio = (weight.scale / scale).reshape(-1, *(1 for _ in weight.codes.shape[1:]))
    zero = weight.zero_point.reshape(ratio.shape)
    codes = ((weight.codes - zero) * ratio).round().to(torch.int64) + zero
    return WeightCodes(torch.where(ratio < 1, codes, weight.codes), scale, weight.zero_point)


@dataclass(frozen=True)
class BiasCodes:
    """A bias (O,) in 32 bits, ``codes scale``, where ``scale`` (O,) is that of the sums that it is added to."""

    codes: Tensor
    scale: Tensor

    @staticmethod
    def of(bias: Tensor, scale: Tensor) -> "BiasCodes":
        return BiasCodes((bias.double() / scale.double()).round().to(torch.int32), scale)
