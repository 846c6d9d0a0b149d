"""Strides of images: what torch calls contiguous is not enough where a dimension has one element."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qtrain.functional.layout import arranged


@pytest.mark.parametrize("channels", [1, 3])
def test_arranged_has_the_strides_of_an_empty_tensor_in_that_format(channels: int) -> None:
    rows = torch.arange(2 * 4 * 4 * channels).float().view(2, 4, 4, channels)
    for images in (rows.permute(0, 3, 1, 2), rows.permute(0, 3, 1, 2).contiguous()):
        for channels_last, strides in ((True, (16 * channels, 1, 4 * channels, channels)), (False, None)):
            made = arranged(images, channels_last=channels_last)
            assert made.stride() == (strides or (16 * channels, 16, 4, 1))
            assert torch.equal(made, images)


def test_convolution_follows_the_strides_of_gray_images() -> None:
    gray = torch.zeros(2, 4, 4, 1).permute(0, 3, 1, 2)
    conv = nn.Conv2d(1, 8, 3, padding=1)
    assert gray.is_contiguous() and not conv(gray).is_contiguous(), "why Tensor.contiguous is not enough"
    assert conv(arranged(gray, channels_last=False)).is_contiguous()
