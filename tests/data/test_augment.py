"""Crop, flip, normalize and mixing against slow, plain versions of themselves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.functional import crop, hflip, pad, to_tensor
from torchvision.transforms.functional import normalize as torchvision_normalize

from qtrain.data.augment import MixPlan, crop_and_flip, mix, normalize, plan_mix, random_crop_flip

IMAGES = torch.randint(0, 256, (20, 9, 11, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_crop_and_flip_equal_torchvisions_pad_crop_flip() -> None:
    """Every offset of padding 2, mirrored and not; the window is cut first and then mirrored, as torchvision does."""
    for top in range(-2, 3):
        for left in range(-2, 3):
            for mirrored in (False, True):
                arguments = [torch.tensor([v]) for v in (7, top, left, mirrored)]
                ours = crop_and_flip(IMAGES, *arguments)[0]
                theirs = crop(pad(IMAGES[7].permute(2, 0, 1), [2]), top + 2, left + 2, 9, 11)
                assert torch.equal(ours.permute(2, 0, 1), hflip(theirs) if mirrored else theirs)


def test_random_crop_uses_every_offset_and_both_sides_equally() -> None:
    """One white pixel in the middle: where it lands tells the offset and the side."""
    image = torch.zeros(1, 7, 7, 1, dtype=torch.uint8)
    image[0, 3, 2] = 255
    many = image.expand(4000, 7, 7, 1).contiguous()
    out = random_crop_flip(many, torch.arange(4000), seed=0, epoch=0, padding=1, flip=True)
    assert out.dtype == torch.uint8 and (out.sum((1, 2, 3)) == 255).all()
    places = out[..., 0].flatten(1).argmax(1).bincount(minlength=49)
    # rows 2..4; columns 2 plus or minus 1, mirrored 4 plus or minus 1: column 3 is reached both ways
    expected = torch.zeros(7, 7)
    expected[2:5, 1:6] = torch.tensor([1.0, 1, 2, 1, 1]) * 4000 / 18
    assert torch.equal(places.view(7, 7) > 0, expected > 0)
    deviation = (places.view(7, 7) - expected)[expected > 0] / expected[expected > 0].sqrt()
    assert deviation.abs().max() < 4


def test_augmentation_depends_on_sample_and_epoch_not_on_the_batch() -> None:
    key = {"seed": 0, "padding": 2, "flip": True}
    whole = random_crop_flip(IMAGES, torch.arange(20), epoch=1, **key)
    assert torch.equal(random_crop_flip(IMAGES, torch.tensor([13, 4]), epoch=1, **key), whole[[13, 4]])
    assert not torch.equal(random_crop_flip(IMAGES, torch.arange(20), epoch=2, **key), whole)


def test_without_padding_and_flip_nothing_changes() -> None:
    index = torch.tensor([5, 5, 0])
    assert torch.equal(random_crop_flip(IMAGES, index, seed=0, epoch=0, padding=0, flip=False), IMAGES[index])


@pytest.mark.parametrize("channels_last", [True, False])
def test_normalize_equals_torchvision(channels_last: bool) -> None:
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    ours = normalize(IMAGES, mean, std, channels_last=channels_last)
    theirs = torch.stack([torchvision_normalize(to_tensor(image.numpy()), mean, std) for image in IMAGES])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    assert ours.is_contiguous(memory_format=memory_format)


def test_mix_by_hand() -> None:
    """Pair 0 blends by 0.75; pair 1 swaps the top left 1x2 of its 2x4 pixels and keeps 6/8."""
    image = torch.arange(4 * 2 * 4, dtype=torch.float32).view(4, 1, 2, 4)
    plan = MixPlan(
        pixel_share=torch.tensor([0.75, 1.0]),
        label_share=torch.tensor([0.75, 6 / 8]),
        box=torch.tensor([[0, 0, 0, 0], [0, 1, 0, 2]]),
    )
    mixed, labels = mix(image, torch.tensor([0, 1, 2, 2]), plan, num_classes=3)
    assert torch.equal(mixed[0], 0.75 * image[0] + 0.25 * image[1])
    assert torch.equal(mixed[1], 0.75 * image[1] + 0.25 * image[0])
    pasted = image[2].clone()
    pasted[0, 0, :2] = image[3, 0, 0, :2]
    assert torch.equal(mixed[2], pasted)
    assert torch.equal(labels, torch.tensor([[0.75, 0.25, 0], [0.25, 0.75, 0], [0, 0, 1], [0, 0, 1]]))


def plan(pairs: torch.Tensor, mixup: float, cutmix: float, epoch: int = 0) -> MixPlan:
    return plan_mix(pairs, seed=0, epoch=epoch, mixup=mixup, cutmix=cutmix, height=32, width=32)


def test_mixup_shares_follow_beta() -> None:
    """Beta(a, a) has mean 1/2 and variance 1 / (4 (2a + 1))."""
    for alpha in (0.2, 1.0, 4.0):
        share = plan(torch.arange(20000), alpha, 0.0).pixel_share
        assert share.min() >= 0 and share.max() <= 1
        assert abs(share.mean().item() - 0.5) < 0.015
        assert share.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.05)


def test_cutmix_label_share_is_the_area_that_was_kept() -> None:
    made = plan(torch.arange(500), 0.0, 1.0)
    assert torch.equal(made.pixel_share, torch.ones(500))
    for share, (top, bottom, left, right) in zip(made.label_share, made.box.tolist(), strict=True):
        keep = torch.ones(32, 32)
        keep[top:bottom, left:right] = 0
        assert keep.mean().item() == pytest.approx(share.item(), abs=1e-6)
    assert made.label_share.std() > 0.1


def test_mixup_and_cutmix_are_equally_likely_with_both_on() -> None:
    made = plan(torch.arange(4000), 1.0, 1.0)
    cuts = (made.pixel_share == 1) | (made.box.sum(1) > 0)
    assert 0.46 < cuts.float().mean() < 0.54


def test_plan_is_a_function_of_pair_and_epoch() -> None:
    whole = plan(torch.arange(100), 0.4, 1.0)
    for part, same in zip(whole, plan(torch.tensor([3, 77]), 0.4, 1.0), strict=True):
        assert torch.equal(part[[3, 77]], same)
    assert not torch.equal(whole.label_share, plan(torch.arange(100), 0.4, 1.0, epoch=1).label_share)


def test_mixing_keeps_memory_format_and_probabilities() -> None:
    image = torch.randn(6, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    made = plan_mix(torch.tensor([9, 2, 4]), seed=0, epoch=0, mixup=1.0, cutmix=1.0, height=8, width=8)
    mixed, labels = mix(image, torch.arange(6), made, num_classes=6)
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(labels.sum(1), torch.ones(6))
    loss = F.cross_entropy(torch.zeros(6, 6), labels)
    assert loss.item() == pytest.approx(torch.tensor(6.0).log().item())
