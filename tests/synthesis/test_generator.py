"""The generator's shapes, that its pixels are pixels, and that it keeps nothing of the batches it saw."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qtrain.spec import DataInfo
from qtrain.synthesis.generator import Generator, shape_of


def info(size: int, channels: int) -> DataInfo:
    mean, std = (0.1, 0.5, 0.7)[:channels], (0.2, 0.3, 0.4)[:channels]
    return DataInfo("some", 10, channels, size, mean, std, 0, 0, 0, "resident")


def codes(count: int, latent: int = 5) -> Tensor:
    return torch.randn(count, latent, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [7, 8, 28, 30, 32, 64, 224])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_any_size(size: int, channels: int) -> None:
    generator = Generator(latent=5, info=info(size, channels), width=2)
    assert generator(codes(2)).shape == (2, channels, size, size)


def test_the_papers_network_for_32_pixels() -> None:
    assert shape_of(32, 64) == (8, (128, 64))
    assert shape_of(8, 64) == (2, (128, 64))
    start, channels = shape_of(224, 64)
    assert start * 2 ** len(channels) == 224 and channels[-1] == 64 and max(channels) == 512


def test_pixels_lie_between_black_and_white_and_come_near_both() -> None:
    torch.manual_seed(0)
    generator = Generator(latent=5, info=info(8, 3), width=4)
    with torch.no_grad():
        generator.get_parameter("last.1.weight").fill_(50.0)  # what tanh is given goes far out
        images = generator(codes(64))
    for channel, (mean, std) in enumerate(zip((0.1, 0.5, 0.7), (0.2, 0.3, 0.4), strict=True)):
        pixels = images[:, channel] * std + mean
        assert -1e-6 <= pixels.min() < 0.01 and 0.99 < pixels.max() <= 1 + 1e-6


def test_generator_state_consists_of_its_parameters() -> None:
    torch.manual_seed(0)
    generator = Generator(latent=5, info=info(8, 1), width=4)
    before = {name: tensor.clone() for name, tensor in generator.state_dict().items()}
    first = generator(codes(6))
    generator.eval()
    assert torch.equal(generator(codes(6)), first), "the mode makes no difference"
    assert set(before) == {name for name, _ in generator.named_parameters()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in generator.state_dict().items())


def test_the_gradient_reaches_every_parameter() -> None:
    torch.manual_seed(0)
    generator = Generator(latent=5, info=info(8, 3), width=4)
    generator(codes(6)).square().mean().backward()
    # A bias in front of batch norm changes nothing: its gradient is zero but for rounding.
    assert all(p.grad is not None and p.grad.any() for p in generator.parameters())
