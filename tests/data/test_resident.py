"""Digits and the resident loader: sizes, splits, ranks, calibration, options that cannot be."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from qtrain.data.augment import mix, plan_mix
from qtrain.data.digits import Digits
from qtrain.spec import NO_LABEL, Batch


def digits(**options: object) -> Digits:
    data = Digits(**options)  # type: ignore[arg-type]
    data.setup()
    return data


def test_digits_match_scikit_learn() -> None:
    info = digits().info
    assert (info.name, info.kind, info.num_classes, info.in_channels, info.image_size) == (
        "digits",
        "resident",
        10,
        1,
        8,
    )
    assert (info.train_size, info.val_size, info.test_size) == (1437, 0, 360)
    batches = list(digits().test_dataloader())
    assert sum(len(b.target) for b in batches) == 360
    assert torch.cat([b.target for b in batches]).bincount(minlength=10).min() > 20


def test_nearest_class_mean_recognizes_them() -> None:
    """Images and labels belong together: the simplest classifier there is reaches 85 percent."""
    data = digits(batch_size=1437, eval_batch_size=360)
    (train,) = data.calibration_batches(1)
    (test,) = data.test_dataloader()
    means = torch.stack([train.image[train.target == c].mean(0) for c in range(10)]).flatten(1)
    assert (torch.cdist(test.image.flatten(1), means).argmin(1) == test.target).float().mean() > 0.85


def test_training_batches_are_normalized_and_typed() -> None:
    batches = list(digits().train_dataloader())
    assert len(batches) == 1437 // 64
    image = torch.cat([b.image for b in batches])
    assert image.dtype == torch.float32 and abs(image.mean().item()) < 0.02 and abs(image.std().item() - 1) < 0.02
    assert batches[0].target.dtype == batches[0].index.dtype == torch.int64


def test_validation_and_test_images_are_never_trained_on() -> None:
    data = digits(val_fraction=0.2)
    train = torch.cat([b.index for b in data.train_dataloader()] + [b.index for b in data.calibration_batches(30)])
    val = torch.cat([b.index for b in data.val_dataloader()])  # type: ignore[union-attr]
    assert (data.info.train_size, data.info.val_size) == (1150, 287)
    assert len(val) == 287 and not set(train.tolist()) & set(val.tolist())
    assert digits().val_dataloader() == []
    other = digits(val_fraction=0.2, seed=7)
    assert torch.equal(val, torch.cat([b.index for b in other.val_dataloader()]))  # type: ignore[union-attr]


def test_evaluation_is_not_augmented_and_training_is() -> None:
    plain = digits(crop_padding=0)
    moved = digits(crop_padding=2)

    def by_number(batches: list[Batch]) -> torch.Tensor:
        order = torch.cat([b.index for b in batches]).argsort()
        return torch.cat([b.image for b in batches])[order]

    for method in ("test_dataloader", "train_dataloader"):
        a, b = (by_number(list(getattr(data, method)())) for data in (plain, moved))
        assert torch.equal(a, b) == (method == "test_dataloader")


@pytest.mark.parametrize("mixing", [dict(), dict(mixup=0.5, cutmix=1.0)])
def test_two_ranks_together_make_the_batches_of_one(mixing: dict[str, float]) -> None:
    """Augmented and mixed pixels too, which is what makes a distributed run equal to a single one."""
    options = dict(crop_padding=1, max_train=200, batch_size=64, **mixing)
    alone = list(digits(**options).train_dataloader())
    ranks = []
    for rank in range(2):
        data = digits(**options)
        strategy = SimpleNamespace(root_device=torch.device("cpu"))
        data.trainer = SimpleNamespace(global_rank=rank, world_size=2, strategy=strategy)  # type: ignore[assignment]
        ranks.append(list(data.train_dataloader()))
    assert len(alone) == 3
    for whole, first, second in zip(alone, *ranks, strict=True):
        assert len(first.index) == 32
        for field, a, b in zip(whole, first, second, strict=True):
            assert torch.equal(field, torch.cat([a, b]))


def batch_of_epoch(epoch: int, **options: object) -> Batch:
    """All of 64 training images, by number, as the loader shows them in ``epoch``."""
    loader = digits(max_train=64, batch_size=64, **options).train_dataloader()
    loader.set_epoch(epoch)
    (batch,) = loader
    return batch


@pytest.mark.parametrize("options", [dict(crop_padding=2), dict(flip=True)])
def test_windows_of_a_sample_differ_from_epoch_to_epoch_and_repeat(options: dict[str, object]) -> None:
    first, second, again = (batch_of_epoch(epoch, **options) for epoch in (0, 1, 1))
    one, two = (batch.image[batch.index.argsort()] for batch in (first, second))
    same = (one == two).flatten(1).all(1).float().mean()  # of 25 windows one, of two sides one
    assert same < (0.2 if "crop_padding" in options else 0.8)
    assert torch.equal(second.image, again.image)


@pytest.mark.parametrize("options", [dict(mixup=1.0), dict(cutmix=1.0)])
def test_pairs_mix_by_the_shares_of_their_epoch(options: dict[str, float]) -> None:
    shares = {"mixup": 0.0, "cutmix": 0.0, **options}
    for epoch in (0, 2):
        mixed, plain = batch_of_epoch(epoch, **options), batch_of_epoch(epoch)
        assert torch.equal(mixed.index, plain.index)
        plan = plan_mix(plain.index[::2], seed=0, epoch=epoch, height=8, width=8, **shares)
        image, target = mix(plain.image, plain.target, plan, num_classes=10)
        assert torch.equal(mixed.image, image)
        assert torch.equal(mixed.target, target)


def test_calibration_follows_the_seed_and_is_plain() -> None:
    data = digits(crop_padding=2, mixup=1.0)
    batches = data.calibration_batches(3)
    assert [len(b.target) for b in batches] == [64] * 3 and batches[0].target.ndim == 1
    assert all(torch.equal(a.image, b.image) for a, b in zip(batches, data.calibration_batches(3), strict=True))
    assert not torch.equal(batches[0].index, digits(seed=1).calibration_batches(3)[0].index)
    (every,) = digits(batch_size=1437).calibration_batches(1)
    reference = dict(zip(every.index.tolist(), every.image, strict=True))
    assert all(torch.equal(x, reference[int(i)]) for b in batches for i, x in zip(b.index, b.image, strict=True))


def test_calibration_with_too_few_images_takes_all() -> None:
    batches = digits(max_train=100).calibration_batches(5)
    assert torch.cat([b.index for b in batches]).unique().numel() == 100


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_makes_the_same_batches() -> None:
    options = dict(crop_padding=1, flip=True, mixup=0.2, cutmix=1.0)
    for a, b in zip(
        digits(**options).train_dataloader(), digits(device="cuda", **options).train_dataloader(), strict=True
    ):
        assert b.image.is_cuda
        torch.testing.assert_close(a.image, b.image.cpu(), rtol=0, atol=1e-6)
        assert torch.equal(a.index, b.index.cpu())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(batch_size=0), "Digits: batch_size must be at least 1, got 0"),
        (dict(max_test=0), "Digits: max_test must be at least 1, got 0"),
        (dict(val_fraction=1.0), r"Digits: val_fraction must be in \[0, 1\), got 1.0"),
        (dict(val_fraction=0.0001), "val_fraction 0.0001 of 1437 images is less than one image; raise it"),
        (dict(mixup=-0.1), "Digits: mixup must be at least 0, got -0.1; 0 turns it off"),
        (dict(crop_padding=-1), "Digits: crop_padding must be at least 0, got -1; in pixels"),
        (dict(mean=(0.5,)), "Digits: mean and std belong together"),
        (dict(mean=(0.5,), std=(0.0,)), "Digits: std must be above 0, got"),
        (dict(mean=(0.5, 0.5), std=(0.5, 0.5)), r"need one value for each of 1 channel\(s\)"),
        (dict(batch_size=2000), "at most the number of training images, got 2000 for 1437"),
        (dict(batch_size=33, mixup=0.2), r"need an even batch on each rank, got batch_size 33 on 1 rank\(s\)"),
    ],
)
def test_wrong_options_give_a_one_line_error(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        digits(**options).train_dataloader()
    assert "\n" not in str(caught.value)


def test_info_before_setup_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"known after setup\(\)"):
        _ = Digits().info


def test_only_so_many_training_images_keep_their_labels() -> None:
    """The chosen ones are the same for each seed; calibration does not see the hidden labels either."""
    whole = torch.cat([b.target for b in digits(batch_size=1437).train_dataloader()])
    assert (whole >= 0).all()
    known: list[set[int]] = []
    for seed in (0, 1):
        data = digits(labeled=100, seed=seed)
        for batches in (data.train_dataloader(), data.calibration_batches(30)):
            target, index = (torch.cat([getattr(b, part) for b in batches]) for part in ("target", "index"))
            known.append(set(index[target != NO_LABEL].tolist()))
    assert all(len(found) <= 100 for found in known) and len(known[1]) == len(set.union(*known)) == 100


def test_hidden_labels_are_the_only_change() -> None:
    for few, all_labels in zip(digits(labeled=100).train_dataloader(), digits().train_dataloader(), strict=True):
        assert torch.equal(few.image, all_labels.image) and torch.equal(few.index, all_labels.index)
        assert torch.equal(few.target[few.target >= 0], all_labels.target[few.target >= 0])


def test_images_for_validation_and_test_keep_their_labels() -> None:
    data = digits(labeled=10, val_fraction=0.2, batch_size=8)
    val = torch.cat([b.target for b in data.val_dataloader()])  # type: ignore[union-attr]
    test = torch.cat([b.target for b in data.test_dataloader()])
    assert len(val) == 287 and len(test) == 360 and val.min() == test.min() == 0


def test_training_on_labels_only_leaves_out_the_other_images() -> None:
    data = digits(labeled=100, batch_size=50)
    data.train_on_labels_only(True)
    batches = list(data.train_dataloader())
    assert [len(b.target) for b in batches] == [50, 50] and min(int(b.target.min()) for b in batches) == 0
    data.train_on_labels_only(False)
    assert len(data.train_dataloader()) == 1437 // 50
    whole = data.with_all_labels()
    assert all((b.target >= 0).all() for b in whole.train_dataloader()) and len(whole.train_dataloader()) == 1437 // 50


def test_more_labels_than_images_hide_nothing() -> None:
    assert all((b.target >= 0).all() for b in digits(labeled=5000).train_dataloader())


def test_images_without_labels_are_not_mixed() -> None:
    with pytest.raises(ValueError, match=r"^Digits: labeled=10 leaves images without labels, which cannot be mixed"):
        Digits(labeled=10, mixup=0.2)


def test_as_many_images_as_asked_for_are_for_the_test() -> None:
    small, half = digits(), digits(test_images=898)
    assert (half.info.train_size, half.info.test_size) == (899, 898)
    image = torch.cat([b.image for b in small.test_dataloader()]) * small.info.std[0] + small.info.mean[0]
    longer = torch.cat([b.image for b in half.test_dataloader()]) * half.info.std[0] + half.info.mean[0]
    torch.testing.assert_close(longer[:360], image)
    with pytest.raises(ValueError, match=r"^Digits: test_images must be in \[1, 1797\), got 1797"):
        Digits(test_images=1797)
