"""SQuant: rounding from the weights alone, so that errors cancel within each kernel and each output channel."""

import logging
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from qtrain.ptq.rounding.base import Candidates, Rounding, all_candidates, write_

log = logging.getLogger(__name__)


def flip_largest(perturbation: Tensor, free: Tensor, sign: Tensor, count: Tensor) -> Tensor:
    """``perturbation`` (R, n) with ``count`` (R, 1) elements of each row moved by ``-sign`` (R, 1).

    These are the largest elements with the row's ``sign`` among ``free`` (R, n). Rounding an element ``d`` to the other
    side adds ``1 - 2|d|`` to the squared error, so the largest cost least. Fewer move where there are no more.
    """
    size = (perturbation * sign).masked_fill(~free, -torch.inf)
    rank = size.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return perturbation - ((rank < count) & (size > 0)) * sign


def cancel(perturbation: Tensor, free: Tensor) -> Tensor:
    """Perturbations (C, K, n) of nearest rounding, in steps, after SQuant's passes over C channels of K kernels.

    Guo et al. 2022, arXiv 2202.07471, §3.3. Nearest rounding is the pass E: ``|d| <= 1/2``. The pass K flips elements
    of each kernel until its sum is within a half; the pass C then flips one more element in some kernels, those with
    the largest sums, until the sum of each channel is within a half. Where K went beyond zero, this element is one that
    K had flipped, and it is flipped back. In the end ``|d| < 1`` for each element, ``|sum d| <= 1/2`` for each channel,
    and for each kernel at most 1/2, or below 1 where C flipped. Only ``free`` elements are flipped; if they are too
    few, the sums come as near as possible.
    """
    channels, kernels, size = perturbation.shape
    each, free = perturbation.reshape(-1, size), free.reshape(-1, size)
    total = each.sum(dim=1, keepdim=True)
    each = flip_largest(each, free, total.sign(), total.abs().round())

    total = each.sum(dim=1, keepdim=True)
    can_flip = (free & (each * total.sign() > 0)).any(dim=1)
    sums = total.reshape(channels, kernels)
    channel = sums.sum(dim=1, keepdim=True)
    moved = flip_largest(sums, can_flip.reshape(sums.shape), channel.sign(), channel.abs().round())
    chosen = (moved != sums).reshape(-1, 1)
    return flip_largest(each, free, total.sign(), chosen).reshape(perturbation.shape)


@final
class SQuant(Rounding):
    """Needs no images: rounds so that the rounding errors of each kernel and each channel sum to at most a half step.

    Guo et al. 2022, arXiv 2202.07471: of the Hessian of a layer's output only the part that is common to the elements
    of a kernel, and of a channel, is kept. The loss then consists of those sums; see :func:`cancel`. Weights beyond the
    range are clipped as before and do not count. The kernels of a linear layer have one element. Where steps differ
    along the inputs (granularity block), the inputs that share a step count as one channel.
    """

    needs_images = False

    def __call__(self, student: nn.Module, images: Sequence[Tensor], *, seed: int) -> None:
        for name, chosen in all_candidates(student).items():
            values = rounded(chosen)
            changed = int((values != chosen.nearest).sum())
            log.info("%s: %d of %d weights leave their nearest code", name, changed, values.numel())
            write_(chosen, values)


@torch.no_grad()
def rounded(chosen: Candidates) -> Tensor:
    """The weight's values after :func:`cancel`, (O, I, ...); nearest if steps differ within a kernel."""
    quantizer = chosen.layer.weight_quantizer
    assert quantizer is not None
    state, shape = quantizer.state_shape, chosen.steps.shape
    if any(n > 1 for n in state[2:]):
        log.warning("left at nearest rounding: %s: its steps differ within a kernel", quantizer)
        return chosen.nearest
    blocks = state[1] if len(state) > 1 else 1
    by_kernel = (shape[0] * blocks, shape[1] // blocks, shape[2:].numel())
    up = chosen.nearest == chosen.up
    below = chosen.steps.floor()
    perturbation = torch.where(chosen.free, below + up.float() - chosen.steps, 0.0)
    after = cancel(perturbation.reshape(by_kernel), chosen.free.reshape(by_kernel)).reshape(shape)
    flipped = (after - perturbation).abs() > 0.5
    return torch.where(flipped, torch.where(up, chosen.down, chosen.up), chosen.nearest)
