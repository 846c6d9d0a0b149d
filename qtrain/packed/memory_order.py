"""The order of a kernel in memory, by its strides: torch chooses how it convolves by them, and so how it rounds.

A kernel with one input channel, or of one pixel, lies in memory in both orders at once; its strides still name one.
"""

import torch
from torch import Tensor, nn

from qtrain.nn import QuantConv


def has_channels_last(weight: Tensor) -> bool:
    """Whether the strides of ``weight`` are those of channels that come last; false of all but four axes."""
    return weight.ndim == 4 and weight.stride() == _strides(weight, channels_last=True)


@torch.no_grad()
def order_(layer: nn.Module, *, channels_last: bool) -> None:
    """Give the kernel of a two-dimensional convolution the strides of this order, in place; others stay as they are."""
    if isinstance(layer, QuantConv) and layer.weight.ndim == 4:
        stride = _strides(layer.weight, channels_last=channels_last)
        ordered = torch.empty_strided(layer.weight.shape, stride, dtype=layer.weight.dtype, device=layer.weight.device)
        layer.weight.data = ordered.copy_(layer.weight)


def _strides(weight: Tensor, *, channels_last: bool) -> tuple[int, ...]:
    order = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(weight.shape, device="meta", memory_format=order).stride()
