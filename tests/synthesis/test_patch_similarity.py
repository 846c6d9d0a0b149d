"""PSAQ-ViT: its entropy against scipy's density and a fine integral, what it sees of a timm ViT, and that it rises."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from scipy.integrate import trapezoid
from scipy.stats import gaussian_kde
from torch import Tensor, nn

from qtrain.models.factory import create_model
from qtrain.spec import DataInfo
from qtrain.synthesis.patch_similarity import (
    FLOOR,
    PatchSimilarity,
    PatchTaps,
    attention_blocks,
    differential_entropy,
    patch_similarities,
)

CPU = torch.device("cpu")
INFO = DataInfo("tiny", 4, 3, 16, (0.5,) * 3, (0.25,) * 3, 0, 0, 0, "resident")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    """Two blocks of three heads on sixteen patches of 4x4 pixels, and a class token."""
    torch.manual_seed(0)
    options = {"embed_dim": 24, "depth": 2, "num_heads": 3, "patch_size": 4}
    model = create_model(name="vit_tiny_patch16_224", num_classes=4, image_size=16, **options)
    for parameter in model.parameters():  # a fresh ViT's logits are nearly constant
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval().requires_grad_(False)


def by_scipy(values: Sequence[float], bandwidth: float, points: int) -> float:
    kernel = gaussian_kde(values, bw_method=bandwidth / np.std(values, ddof=1))
    places = np.linspace(min(values), max(values), points)
    density = kernel(places) + FLOOR
    return float(trapezoid(-density * np.log(density), places))


@pytest.mark.parametrize(("bandwidth", "points"), [(0.05, 40), (0.01, 10), (0.3, 25)])
def test_the_entropy_is_that_of_a_kernel_density(bandwidth: float, points: int) -> None:
    values = (noise(3, 60) / 3).clamp(-1, 1)
    entropy = differential_entropy(values.double(), bandwidth=bandwidth, points=points)
    expected = [by_scipy(row, bandwidth, points) for row in values.double().tolist()]
    assert entropy.tolist() == pytest.approx(expected, rel=1e-6)


def test_the_entropy_of_many_values_is_that_of_their_distribution() -> None:
    """Uniform on [0, 2]: ln 2. The kernels smear the ends by a bandwidth of 0.02."""
    values = torch.linspace(0, 2, 4001, dtype=torch.float64)[None]
    assert differential_entropy(values, bandwidth=0.02, points=200).item() == pytest.approx(np.log(2), abs=0.03)


def test_the_gradient_is_that_of_difference_quotients() -> None:
    values = (noise(1, 12) / 3).double().requires_grad_()

    def inner(x: Tensor) -> Tensor:  # lowest and highest value are the ends of the integral, and held
        ends = torch.tensor([[-1.0, 1.0]], dtype=torch.float64)
        return differential_entropy(torch.cat([x, ends], dim=1), bandwidth=0.1, points=30)

    assert torch.autograd.gradcheck(inner, (values,))


def test_patch_similarities_match_values_computed_by_hand() -> None:
    tokens = torch.tensor([[[3.0, 0.0], [1.0, 1.0]]])
    expected = torch.tensor([[1.0, 0.5**0.5, 0.5**0.5, 1.0]])
    torch.testing.assert_close(patch_similarities(tokens), expected)


def test_patches_of_a_vit_are_attention_times_values_averaged_over_heads(vit: nn.Module) -> None:
    """Each block's attention worked out anew from its own projections, head by head, without the class token."""
    images = noise(2, 3, 16, 16)
    inputs: dict[str, Tensor] = {}
    handles = [
        block.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
        for name, block in attention_blocks(vit).items()
    ]
    with PatchTaps(vit, bandwidth=0.05, points=20) as taps:
        vit(images)
        entropy = taps.entropy()
    for handle in handles:
        handle.remove()
    expected = []
    for name, block in attention_blocks(vit).items():
        queries, keys, values = block.qkv(inputs[name]).chunk(3, dim=2)
        heads = []
        for head in range(3):
            part = slice(8 * head, 8 * head + 8)
            weights = (queries[..., part] @ keys[..., part].transpose(1, 2) / 8**0.5).softmax(dim=2)
            heads.append(weights @ values[..., part])
        patches = torch.stack(heads).mean(dim=0)[:, 1:]
        assert patches.shape == (2, 16, 8)
        rows = [
            [float(torch.cosine_similarity(a, b, dim=0)) for a in sample for b in sample] for sample in patches.double()
        ]
        expected.append(np.mean([by_scipy(row, 0.05, 20) for row in rows]))
    assert entropy.item() == pytest.approx(sum(expected), rel=1e-3)
    assert len(expected) == 2
    assert all(not module._forward_pre_hooks for module in vit.modules())


def test_images_have_more_entropy_than_noise_and_are_classified_as_labeled(vit: nn.Module) -> None:
    method = PatchSimilarity(batch_size=8, steps=30, lr=0.1, points=20)
    made = method.make([vit], INFO, number=0, seed=0, device=CPU)
    assert made.metrics["patch_entropy"] > made.metrics["noise_patch_entropy"] + 0.2
    assert made.metrics["as_labeled"] > 0.8
    assert made.images.shape == (8, 16, 16, 3) and made.labels.tolist() == [0, 1, 2, 3] * 2


def test_batch_is_a_function_of_its_number(vit: nn.Module) -> None:
    def make(number: int) -> Tensor:
        method = PatchSimilarity(batch_size=4, steps=2, points=5, shift=2)
        return method.make([vit], INFO, number=number, seed=0, device=CPU).images

    first = make(1)
    assert not torch.equal(first, make(0))
    assert torch.equal(first, make(1))


def test_deit_and_two_prefix_tokens() -> None:
    options = {"embed_dim": 12, "depth": 1, "num_heads": 3, "patch_size": 4}
    model = create_model(name="deit_tiny_distilled_patch16_224", num_classes=4, image_size=16, **options).eval()
    with PatchTaps(model, bandwidth=0.05, points=5) as taps:
        model(noise(2, 3, 16, 16))
        assert [tuple(patches.shape) for patches in taps._seen.values()] == [(2, 16, 4)]


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no self-attention of timm's kind.*bn_statistics"):
        PatchSimilarity().check([nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"bandwidth": 0.0}, "bandwidth must be above 0, got 0.0"),
        ({"points": 1}, "points must be at least 2, got 1"),
        ({"entropy": -1.0}, "entropy must be at least 0, got -1.0"),
    ],
)
def test_options_out_of_range(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PatchSimilarity(**options)  # type: ignore[arg-type]
