"""What the loop that makes images is built of: augmentation, priors, labels, noise, and the optimizer itself."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from qtrain.spec import DataInfo
from qtrain.synthesis.augment import StepAugmentation, window
from qtrain.synthesis.base import from_pixels, pixel_range, to_pixels
from qtrain.synthesis.init_noise import balanced_labels, natural_noise, white_noise
from qtrain.synthesis.optimize import ImageOptimizer, image_metrics
from qtrain.synthesis.priors import squared_norm, total_variation

CPU = torch.device("cpu")


def info_of(classes: int = 3, size: int = 6, channels: int = 2) -> DataInfo:
    return DataInfo("tiny", classes, channels, size, (0.4,) * channels, (0.25,) * channels, 0, 0, 0, "resident")


def images_of(count: int = 4, size: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 2, size, size, generator=generator)


BLACK = torch.full((1, 2, 1, 1), -1.6)


def test_shift_moves_the_image_by_whole_pixels_and_fills_with_black() -> None:
    images, augmentation = images_of(40), StepAugmentation(shift=2)
    seen = augmentation(images, BLACK, seed=3, number=1, step=7)
    padded = torch.full((40, 2, 10, 10), -1.6)
    padded[:, :, 2:8, 2:8] = images
    places = set()
    for n in range(40):
        found = [
            (top, left)
            for top in range(5)
            for left in range(5)
            if torch.allclose(seen[n], padded[n, :, top : top + 6, left : left + 6], atol=1e-5)
        ]
        assert len(found) == 1
        places.add(found[0])
    assert {top for top, _ in places} == {left for _, left in places} == set(range(5))


def test_a_flip_mirrors_about_half_of_the_images() -> None:
    images = images_of(64)
    seen = StepAugmentation(flip=True)(images, BLACK, seed=0, number=0, step=0)
    mirrored = [torch.allclose(a, b.flip(2), atol=1e-5) for a, b in zip(seen, images, strict=True)]
    kept = [torch.allclose(a, b, atol=1e-5) for a, b in zip(seen, images, strict=True)]
    assert all(m != k for m, k in zip(mirrored, kept, strict=True))
    assert 20 < sum(mirrored) < 44


def test_a_window_of_a_ramp_is_the_ramp_between_its_edges() -> None:
    """Bilinear enlargement keeps a linear ramp: column x of the view shows ``center + side * x``."""
    middles = (torch.arange(8) + 0.5) / 4 - 1  # centers of eight pixels on the axis from -1 to 1
    ramp = middles.expand(2, 1, 8, 8)
    side, center = torch.tensor([0.5, 0.5]), torch.tensor([[0.25, 0.0], [-0.25, 0.5]])
    seen = window(ramp, side, center, torch.tensor([False, True]), torch.zeros(1, 1, 1, 1))
    torch.testing.assert_close(seen[0, 0, 3], 0.25 + 0.5 * middles)
    torch.testing.assert_close(seen[1, 0, 3], -0.25 - 0.5 * middles)


def test_crops_are_no_smaller_than_asked_and_stay_inside() -> None:
    """Of a ramp, the spread of a view is its side; black, far below, would show if a window hung over the edge."""
    middles = (torch.arange(32) + 0.5) / 16 - 1
    ramp = torch.stack([middles.expand(32, 32), middles[:, None].expand(32, 32)]).expand(50, 2, 32, 32)
    seen = StepAugmentation(smallest_crop=0.3, crop_steps=1.0)(
        ramp, torch.full((1, 2, 1, 1), -9.0), seed=0, number=0, step=0
    )
    sides = seen[:, 0, 16].amax(dim=1) - seen[:, 0, 16].amin(dim=1)
    areas = (sides / (2 * 31 / 32)) ** 2
    assert areas.min() > 0.29 and areas.max() < 1.01 and areas.max() - areas.min() > 0.4
    assert seen.min() >= -1


def test_only_a_share_of_the_steps_crops() -> None:
    images, augmentation = images_of(2), StepAugmentation(smallest_crop=0.3, crop_steps=0.25)
    whole = sum(
        torch.allclose(augmentation(images, BLACK, seed=0, number=0, step=s), images, atol=1e-5) for s in range(400)
    )
    assert 270 < whole < 330


def test_augmentation_depends_on_seed_number_and_step_and_lets_gradients_through() -> None:
    images, augmentation = images_of().requires_grad_(), StepAugmentation(shift=2, flip=True, smallest_crop=0.5)
    seen = augmentation(images, BLACK, seed=0, number=0, step=0)
    assert torch.equal(seen, augmentation(images, BLACK, seed=0, number=0, step=0))
    for other in ({"seed": 1}, {"number": 1}, {"step": 1}):
        assert not torch.equal(seen, augmentation(images, BLACK, **{"seed": 0, "number": 0, "step": 0, **other}))
    (grad,) = torch.autograd.grad(seen.sum(), images)
    assert grad.abs().sum() > 0


def test_priors_match_values_computed_by_hand() -> None:
    """[[1, 2], [4, 8]]: right 1 and 4, below 3 and 6, diagonals 7 and -2; squares' means 8.5, 22.5, 49, 4."""
    image = torch.tensor([[[[1.0, 2.0], [4.0, 8.0]]]])
    assert total_variation(image).item() == pytest.approx((8.5 + 22.5 + 49 + 4) / 4)
    assert squared_norm(image).item() == pytest.approx((1 + 4 + 16 + 64) / 4)


def test_labels_come_equally_often_over_all_batches() -> None:
    info = info_of(classes=3)
    labels = [balanced_labels(info, batch_size=4, number=k, device=CPU).tolist() for k in range(3)]
    assert labels == [[0, 1, 2, 0], [1, 2, 0, 1], [2, 0, 1, 2]]
    assert balanced_labels(info, batch_size=8, number=0, device=CPU, run=3).tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    with pytest.raises(ValueError, match="tiny has 1 class"):
        balanced_labels(info_of(classes=1), batch_size=4, number=0, device=CPU)


def test_noise_is_normal_and_a_function_of_the_image_number() -> None:
    info = info_of(size=32)
    noise = white_noise(info, batch_size=8, number=1, seed=5, device=CPU)
    assert noise.mean().abs() < 0.02 and (noise.std() - 1).abs() < 0.02
    assert (noise.square().square().mean() - 3).abs() < 0.15, "the fourth moment of a normal distribution"
    halves = [white_noise(info, batch_size=4, number=k, seed=5, device=CPU) for k in (2, 3)]
    assert torch.equal(noise, torch.cat(halves)), "images 8 to 15, whatever the batch around them"
    assert not torch.equal(noise, white_noise(info, batch_size=8, number=1, seed=6, device=CPU))


def test_natural_noise_has_the_documented_spectrum_and_colors() -> None:
    """Of many images: variance 1, power falling as f^-3 along an axis, and the channels' correlation by hand."""
    info = info_of(size=32, channels=3)
    noise = natural_noise(info, batch_size=200, number=1, seed=0, device=CPU)
    assert noise.square().mean().item() == pytest.approx(1.0, abs=0.05)
    power = torch.fft.fft2(noise).abs().square().mean(dim=(0, 1))
    measured = [(power[0, k] / power[0, 2 * k]).log2().item() for k in (1, 2, 4)]
    assert measured == pytest.approx([3.0, 3.0, 3.0], abs=0.25)
    # Channel c is (sqrt(.8/3) (w1 + w2 + w3) + sqrt(.2) w_c) / d: 0.8 in common, and the mixed terms twice.
    mixed = math.sqrt(0.8 * 0.2 / 3)
    correlation = torch.corrcoef(noise.permute(1, 0, 2, 3).flatten(1))[0, 1].item()
    assert correlation == pytest.approx((0.8 + 2 * mixed) / (1 + 2 * mixed), abs=0.02)
    halves = [natural_noise(info, batch_size=100, number=k, seed=0, device=CPU) for k in (2, 3)]
    torch.testing.assert_close(noise, torch.cat(halves))


def test_pixels_are_unchanged_by_normalization_and_back() -> None:
    info = info_of()
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 8, 2)
    assert torch.equal(to_pixels(from_pixels(pixels, info, CPU), info), pixels)


def test_image_optimizer_reaches_the_target_within_the_pixel_range() -> None:
    """A quadratic whose lowest point lies partly beyond white: there the images end at white."""
    info, start = info_of(), images_of()
    low, high = pixel_range(start, info)
    wanted = torch.linspace(-1, 4, start.numel()).reshape(start.shape)
    optimize = ImageOptimizer(steps=200, lr=0.1)
    images = optimize(start, lambda x: (x - wanted).square().sum(), StepAugmentation(), info, seed=0, number=0)
    torch.testing.assert_close(images, wanted.clamp(low, high).float(), rtol=0, atol=0.02)


def test_rate_of_the_image_optimizer_falls_along_half_a_cosine() -> None:
    """Under a constant gradient each of Adam's steps is the rate: of three, 1, 0.75 and 0.25 times the first."""
    info, start = info_of(), images_of() / 4
    images = ImageOptimizer(steps=3, lr=0.1)(start, lambda x: (3 * x).sum(), StepAugmentation(), info, seed=0, number=0)
    torch.testing.assert_close(images, start - 0.2)


def test_images_are_measured_under_draws_that_no_step_has_used() -> None:
    info, augmentation = info_of(), StepAugmentation(shift=2)
    seen: list[Tensor] = []

    def answer(x: Tensor) -> list[SimpleNamespace]:
        seen.append(x)
        return [SimpleNamespace(statistics=x.mean(), logits=torch.eye(3)[torch.tensor([0, 1, 2, 2])])]

    models: Any = answer
    models.images_format = torch.contiguous_format
    pixels, labels = to_pixels(images_of() / 4, info), torch.tensor([0, 1, 2, 0])
    metrics = image_metrics(models, info, augmentation, pixels=pixels, labels=labels, seed=0, number=0)
    whole, shifted, noise = seen
    assert metrics["as_labeled"] == 0.75
    assert (metrics["statistics"], metrics["noise_statistics"]) == (shifted.mean().item(), noise.mean().item())
    low, _ = pixel_range(whole, info)
    assert not torch.equal(shifted, whole)
    for step in range(50):
        assert not torch.equal(shifted, augmentation(whole, low, seed=0, number=0, step=step))


def test_first_step_of_the_image_optimizer_is_that_of_adam() -> None:
    """Adam's first step is the rate times the sign of the gradient."""
    info, start = info_of(), images_of() / 4
    images = ImageOptimizer(steps=1, lr=0.1)(start, lambda x: (3 * x).sum(), StepAugmentation(), info, seed=0, number=0)
    torch.testing.assert_close(images, start - 0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StepAugmentation(shift=-1), "shift must be at least 0, got -1; in pixels"),
        (
            lambda: StepAugmentation(smallest_crop=0.0),
            r"smallest_crop must be in \(0, 1\], got 0.0; a share of the area",
        ),
        (lambda: StepAugmentation(crop_steps=1.5), r"crop_steps must be in \[0, 1\], got 1.5; a share of the steps"),
        (lambda: ImageOptimizer(steps=0, lr=0.1), "steps must be at least 1, got 0"),
        (lambda: ImageOptimizer(steps=1, lr=0.0), "lr must be above 0, got 0.0"),
    ],
)
def test_options_out_of_range(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=message):
        make()


def test_pixel_range_is_that_of_black_and_white() -> None:
    low, high = pixel_range(images_of(), info_of())
    assert low.flatten().tolist() == pytest.approx([-1.6, -1.6]) and high.flatten().tolist() == pytest.approx([2.4] * 2)
    assert math.isclose((1 - 0.4) / 0.25, 2.4)
