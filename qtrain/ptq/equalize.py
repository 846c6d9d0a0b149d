"""Cross-layer equalization: scaling channels so that one step size suits all of them, without changing the function.

If a tensor with one scale has channels of very different ranges, the narrow ones use only few of the codes. A channel
may be divided by ``s`` in the layer that makes it and multiplied by ``s`` in those that read it. ``s_i = sqrt(r1_i /
r2_i)`` gives it the same range on both sides, ``r1_i`` being its range in the weights before and ``r2_i`` in those
after. This is the best for both (Nagel et al. 2019, arXiv 1906.04721, §4.1, eq. 11). The paper treats pairs of layers;
here a factor may have several layers on either side, as :mod:`qtrain.ptq.channel_groups` ties them together.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor, nn

from qtrain.convert.fold import OutputStatistics, output_on_noise, same_output, scale_outputs_
from qtrain.convert.graph import Skipped
from qtrain.convert.replace import replace_module
from qtrain.ptq.absorb import absorb_high_biases_
from qtrain.ptq.channel_groups import OUTPUT, ScaledLayer, find_channel_groups
from qtrain.utils.compat import share_hooks_

log = logging.getLogger(__name__)

CONVERGED = 1e-2
"""The sweeps over the model end when no factor changes by more than this, relatively."""


@final
class CrossLayerEqualization:
    """Equalizes the ranges of all channels that may be scaled in a float model, in place.

    ``replace_relu6`` first replaces every ReLU6 by a ReLU, as the paper does with MobileNetV2, because a clip at 6 does
    not keep a factor. This changes the function where values above 6 occur. ``absorb`` moves biases into the next layer
    if they are so high that the ReLU between hardly ever cuts (§4.1.3). This makes the range of the activations
    smaller, and is exact except for values beyond three standard deviations. With both off, the function is the same.
    ``sweeps`` is the largest number of passes over the model. Raises ``ValueError`` where no channel can be scaled, and
    where the output on noise changes by more than rounding errors.
    """

    def __init__(self, *, replace_relu6: bool = False, absorb: bool = False, sweeps: int = 40) -> None:
        if sweeps < 1:
            raise ValueError(f"CrossLayerEqualization: sweeps must be at least 1, got {sweeps}; 40 is usual")
        self.replace_relu6, self.absorb, self.sweeps = replace_relu6, absorb, sweeps

    @torch.no_grad()
    def __call__(self, model: nn.Module, example: Tensor, statistics: Mapping[str, OutputStatistics]) -> None:
        """Equalize ``model``, whose batch norms are folded, and scale the ``statistics`` of its outputs likewise.

        ``example`` (N, C, H, W) gives the shapes. Channels that cannot be scaled are logged with the reason.
        """
        if self.replace_relu6:
            _replace_relu6_(model)
        expected = output_on_noise(model, example)
        scales = find_channel_groups(model, example)
        skipped = Skipped("not equalized: output of")
        for name, reason in scales.refused.items():
            skipped.add(name, reason)
        for name, layer in scales.layers.items():
            reasons = {scales.pinned.get(int(i)) for i in layer.outputs}
            if None not in reasons and OUTPUT not in reasons:
                skipped.add(name, str(reasons.pop()))
        skipped.log()
        free = torch.ones(scales.count, dtype=torch.bool)
        free[list(scales.pinned)] = False
        ranges = {name: Ranges(layer) for name, layer in scales.layers.items()}
        among = sides(list(ranges.values()), free)
        if not among:
            raise ValueError(
                f"quantize.equalize: no channel of {type(model).__name__} can be scaled without changing the function; "
                "set quantize.fold=before where it has batch norm, replace_relu6=true where it has ReLU6, or leave "
                "quantize.equalize=none"
            )
        factors, before, after = equalizing_factors(list(ranges.values()), among, scales.count, self.sweeps)
        for name, layer in scales.layers.items():
            _scale_(layer, ranges[name], factors)
            if name in statistics:
                made = factors[layer.outputs].to(statistics[name].mean)
                statistics[name].mean, statistics[name].std = statistics[name].mean / made, statistics[name].std / made
        log.info("equalized: a channel's range is %.2f times below its tensor's on average; it was %.2f", after, before)
        if not same_output(output_on_noise(model, example), expected):
            raise ValueError(
                f"quantize.equalize: {type(model).__name__} computes something else once its channels are scaled; "
                "leave quantize.equalize=none for it"
            )
        if self.absorb:
            absorb_high_biases_(model, statistics)


class Ranges:
    """``table`` (O, I / groups) is ``max |W|`` over the kernel of one layer, with the factors so far applied."""

    def __init__(self, layer: ScaledLayer) -> None:
        self.layer = layer
        weight: Tensor = layer.module.weight  # type: ignore[assignment]
        largest = weight.detach().abs()
        largest = largest.flatten(2).amax(dim=2) if weight.ndim > 2 else largest
        self.table = largest.float().cpu()
        self.groups = int(getattr(layer.module, "groups", 1))

    def by_output(self) -> Tensor:
        return self.table.amax(dim=1)

    def by_input(self) -> Tensor:
        return self.table.reshape(self.groups, -1, self.table.shape[1]).amax(dim=1).flatten()

    def apply_(self, factors: Tensor) -> None:
        """Divide outputs and multiply inputs by their factors."""
        self.table.div_(factors[self.layer.outputs].unsqueeze(1)).mul_(self.of_inputs(factors))

    def of_inputs(self, factors: Tensor) -> Tensor:
        """The factor of the input channel of each weight, (O, I / groups)."""
        outputs, inputs = self.table.shape
        each = factors[self.layer.inputs].reshape(self.groups, 1, inputs)
        return each.expand(-1, outputs // self.groups, -1).reshape(outputs, inputs)


class Side(NamedTuple):
    """Free factors that layers share, with the layers that make and those that read the channels of these factors."""

    factors: Tensor
    makers: list[Ranges]
    readers: list[Ranges]


def sides(ranges: Sequence[Ranges], free: Tensor) -> list[Side]:
    """The free factors in groups, in the order in which their channels are made; no layer makes two groups."""
    found: list[Side] = []
    for maker in ranges:
        factors, makers, apart = maker.layer.outputs.unique(), [maker], []
        for side in found:
            if torch.isin(side.factors, factors).any():
                factors, makers = torch.cat((side.factors, factors)).unique(), side.makers + makers
            else:
                apart.append(side)
        found = [*apart, Side(factors, makers, [])]
    complete = []
    for factors, makers, _ in found:
        kept = factors[free[factors]]
        readers = [reader for reader in ranges if torch.isin(reader.layer.inputs, kept).any()]
        if readers:
            complete.append(Side(kept, makers, readers))
    return complete


def equalizing_factors(
    ranges: Sequence[Ranges], among: Sequence[Side], count: int, sweeps: int
) -> tuple[Tensor, float, float]:
    """The factors, (count,) float64, and the spread (:func:`spread`) of the ranges without and with them.

    Each sweep multiplies the factors of each side by ``sqrt(r1 / r2)``, until nothing changes. With one layer on either
    side this is equation 11. With several layers, ``r`` is the largest of their ranges, each relative to its tensor's.
    If the spread grows meanwhile, the factors of the sweep with the least spread are returned. A channel that is all
    zeros on one side keeps its factor. Changes the ``ranges``.
    """
    factors = torch.ones(count, dtype=torch.float64)
    best, start = factors.clone(), spread(ranges)
    now = least = start
    for _ in range(sweeps):
        before = factors.clone()
        for side in among:
            r1 = _largest([(r.layer.outputs, r.by_output()) for r in side.makers], count)[side.factors]
            r2 = _largest([(r.layer.inputs, r.by_input()) for r in side.readers], count)[side.factors]
            step = torch.ones(count)
            step[side.factors] = torch.where((r1 > 0) & (r2 > 0), (r1 / r2).sqrt(), 1.0)
            factors *= step
            for changed in {id(r): r for r in side.makers + side.readers}.values():
                changed.apply_(step)
        now = spread(ranges)
        if now < least:
            best, least = factors.clone(), now
        if float((factors / before - 1).abs().max()) < CONVERGED:
            break
    return (factors, start, now) if now <= start else (best, start, least)


def spread(ranges: Sequence[Ranges]) -> float:
    """How far the ranges of channels are below that of their tensor: the geometric mean of ``max_j r_j / r_i``.

    It is at least 1 and counts the input and output channels of all layers, but not channels of zeros.
    """
    sides = [each for layer in ranges for each in (layer.by_output(), layer.by_input())]
    return float(torch.cat([(each.max() / each[each > 0]).log() for each in sides]).mean().exp())


def _largest(sides: list[tuple[Tensor, Tensor]], count: int) -> Tensor:
    """For each factor the largest range among ``(factor of each channel, range of each channel)``, 0 if there is none.

    Each tensor is taken relative to its largest range, and the result in units of the largest of all.
    """
    result, largest = torch.zeros(count), [float(each.max()) for _, each in sides]
    for (factor, each), own in zip(sides, largest, strict=True):
        if own > 0:
            result.scatter_reduce_(0, factor, each / own * max(largest), reduce="amax")
    return result


def _scale_(layer: ScaledLayer, ranges: Ranges, factors: Tensor) -> None:
    """Divide a layer's outputs by their factors, and multiply its inputs by theirs."""
    weight: Tensor = layer.module.weight  # type: ignore[assignment]
    scale_outputs_(layer.module, 1 / factors[layer.outputs])
    read = ranges.of_inputs(factors).to(weight)
    weight.mul_(read.reshape(*read.shape, *(1 for _ in weight.shape[2:])))


def _replace_relu6_(model: nn.Module) -> None:
    clipped = [module for module in model.modules() if type(module) is nn.ReLU6]
    for module in clipped:
        relu = nn.ReLU()
        share_hooks_(module, relu)
        replace_module(model, module, relu)
    if clipped:
        log.info("%d ReLU6 are ReLU now", len(clipped))
