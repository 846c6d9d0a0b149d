"""The order of an image's numbers in memory."""

import torch
from torch import Tensor


def arranged(images: Tensor, *, channels_last: bool) -> Tensor:
    """``images`` (N, C, H, W) with the strides of ``torch.channels_last``, or of the contiguous format.

    ``Tensor.contiguous`` leaves images of one channel, or of one pixel, as they are, since they are in both formats.
    But operators look at the strides, and a convolution may give the format back that these suggest.
    """
    if channels_last:
        rows = images.permute(0, 2, 3, 1)
        return rows.contiguous().flatten().view(rows.shape).permute(0, 3, 1, 2)
    return images.contiguous(memory_format=torch.contiguous_format).flatten().view(images.shape)


def plain(images: Tensor) -> Tensor:
    """``images`` (N, C, H, W) as float32 on the CPU in the contiguous format, for a network that may ask for it."""
    return arranged(images.float().cpu(), channels_last=False)
