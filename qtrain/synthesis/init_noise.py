"""The start of the optimization: labels in turn, and noise that is a function of each image's number.

Papers start from white noise. Natural images are not white: the amplitude of their spectrum falls about with the
inverse of the frequency (Field 1987, "Relations between the statistics of natural images and the response properties of
cortical cells"), and their channels vary together. Noise with these two properties is nearer to the statistics of any
model before the first step, and the part of it that the steps do not change does not look like grain.
"""

import math

import torch
from torch import Tensor

from qtrain.functional import random
from qtrain.spec import DataInfo

SLOPE = 1.5
"""The amplitude falls as the frequency to the power of minus this."""
COMMON = 0.8
"""The share of the variance that is common to all channels."""


def balanced_labels(info: DataInfo, *, batch_size: int, number: int, device: torch.device, run: int = 1) -> Tensor:
    """Labels (N,) int64 of batch ``number``: the classes in turn, over all batches, so that each comes equally often.

    ``run`` images in a row have the same label. Raises ``ValueError`` if there is only one class, since all labels
    would be the same.
    """
    if info.num_classes < 2:
        raise ValueError(
            f"synthesis: {info.name} has {info.num_classes} class, and images are told apart by their classes; "
            "give data with at least two"
        )
    index = torch.arange(number * batch_size, (number + 1) * batch_size, device=device)
    return index // run % info.num_classes


def white_noise(info: DataInfo, *, batch_size: int, number: int, seed: int, device: torch.device) -> Tensor:
    """Standard normal (N, C, H, W) as a function of the seed and each image's own number."""
    return _normal(info, batch_size, number, seed).float().to(device)


def natural_noise(info: DataInfo, *, batch_size: int, number: int, seed: int, device: torch.device) -> Tensor:
    """:func:`white_noise` with the spectrum and the colors of natural images; the variance over all images is still 1.

    It is ``sqrt(0.8) common + sqrt(0.2) own``, where ``common`` is the scaled sum of the channels. The amplitude at
    frequency ``f`` is multiplied by ``f^-1.5``; the mean is treated as if it had the lowest frequency.
    """
    white = _normal(info, batch_size, number, seed)
    channels, size = info.in_channels, info.image_size
    common = white.sum(dim=1, keepdim=True) / math.sqrt(channels)
    # Common and own part have a correlation of 1 / sqrt(C); the last line divides by the variance of their sum.
    mixed = math.sqrt(COMMON) * common + math.sqrt(1 - COMMON) * white
    mixed = mixed / math.sqrt(1 + 2 * math.sqrt(COMMON * (1 - COMMON) / channels))
    line = torch.fft.fftfreq(size, dtype=torch.float64)
    frequency = (line[:, None].square() + line[None, :].square()).sqrt()
    frequency[0, 0] = 1 / size
    gain = frequency**-SLOPE
    gain = gain / gain.square().mean().sqrt()
    images: Tensor = torch.fft.ifft2(torch.fft.fft2(mixed) * gain).real
    return images.float().contiguous().to(device)


def _normal(info: DataInfo, batch_size: int, number: int, seed: int) -> Tensor:
    """Standard normal (N, C, H, W) float64, on the CPU, because devices differ in the last digit."""
    shape = (batch_size, info.in_channels, info.image_size, info.image_size)
    index = torch.arange(number * batch_size, (number + 1) * batch_size)
    uniform = random.uniform(seed=seed, epoch=0, index=index, stream=random.NOISE, count=math.prod(shape[1:]))
    # Multiples of 2^-24, moved to the middle of their interval, so that 0 does not become infinite.
    normal: Tensor = torch.special.ndtri(uniform.double() + 2.0**-25).reshape(shape)
    return normal
