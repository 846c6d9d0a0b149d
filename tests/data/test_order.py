"""Which samples batches hold: every sample once, independent of ranks, fixed splits."""

from __future__ import annotations

import pytest
import torch

from qtrain.data.order import BatchOrder, choose, first_samples, split_train_val

SAMPLES = torch.arange(100, 203)


def order(train: bool = True, rank: int = 0, world_size: int = 1, batch_size: int = 16, seed: int = 0) -> BatchOrder:
    return BatchOrder(SAMPLES, seed=seed, batch_size=batch_size, train=train, rank=rank, world_size=world_size)


def test_training_shows_each_sample_at_most_once_in_full_batches() -> None:
    batches = order().batches(epoch=3)
    assert [len(b) for b in batches] == [16] * 6 == [16] * len(order())
    seen = torch.cat(batches)
    assert seen.unique().numel() == 96 and set(seen.tolist()) <= set(SAMPLES.tolist())
    assert not torch.equal(seen, seen.sort().values)


def test_epochs_and_seeds_differ_and_repeat() -> None:
    first = torch.cat(order().batches(epoch=0))
    assert torch.equal(first, torch.cat(order().batches(epoch=0)))
    assert not torch.equal(first, torch.cat(order().batches(epoch=1)))
    assert not torch.equal(first, torch.cat(order(seed=1).batches(epoch=0)))


def test_epochs_of_a_later_stage_are_those_of_the_run() -> None:
    """Counted from where the stage before has ended: no order is seen twice."""
    later = BatchOrder(SAMPLES, seed=0, batch_size=16, train=True, first_epoch=3)
    assert later.epoch == 3
    later.set_epoch(2)
    assert later.epoch == 5
    later.set_epoch(0)
    assert later.epoch == 3


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_see_what_one_rank_sees(train: bool, world_size: int) -> None:
    ranks = [order(train, rank, world_size).batches(epoch=2) for rank in range(world_size)]
    for whole, *parts in zip(order(train).batches(epoch=2), *ranks, strict=True):
        assert torch.equal(whole, torch.cat(parts))
        assert all(len(part) for part in parts)


def test_start_in_mid_epoch_gives_the_remaining_batches() -> None:
    whole = order().batches(epoch=1)
    rest = order().batches(epoch=1, start=4)
    assert len(rest) == 2 and all(torch.equal(a, b) for a, b in zip(whole[4:], rest, strict=True))
    assert order().batches(epoch=1, start=6) == []


def test_evaluation_shows_all_in_order_in_batches_of_nearly_one_size() -> None:
    batches = order(train=False, batch_size=51).batches(epoch=9)
    assert torch.equal(torch.cat(batches), SAMPLES)
    assert sorted(len(b) for b in batches) == [34, 34, 35]


def test_validation_split_does_not_depend_on_the_seed() -> None:
    train, val = split_train_val(SAMPLES, 0.1)
    assert len(val) == 10
    assert torch.equal(torch.cat([train, val]).sort().values, SAMPLES)
    assert not torch.equal(val, SAMPLES[:10])


def test_choose_is_fixed_and_spread_over_the_set() -> None:
    assert torch.equal(choose(1000, None), torch.arange(1000)) and len(choose(10, 20)) == 10
    some = choose(1000, 50)
    assert torch.equal(some, choose(1000, 50)) and some.unique().numel() == 50 and some.max() > 500


def test_calibration_choice_follows_the_seed() -> None:
    a, b = (first_samples(SAMPLES, seed=seed, count=20) for seed in (0, 1))
    assert len(a) == 20 and not torch.equal(a, b) and torch.equal(a, first_samples(SAMPLES, seed=0, count=20))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(batch_size=15, world_size=2), "must divide evenly over the ranks, got 15 for 2; use a multiple of 2"),
        (dict(batch_size=104), "at most the number of training images, got 104 for 103; lower data.batch_size"),
        (dict(train=False, world_size=104), "each of 104 ranks needs an image to evaluate, got 103"),
    ],
)
def test_impossible_batch_sizes_are_refused_with_a_remedy(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        order(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("samples", [128, 257, 300])
def test_each_of_many_ranks_has_an_image_of_each_evaluated_batch(samples: int) -> None:
    orders = [
        BatchOrder(torch.arange(samples), seed=0, batch_size=64, train=False, rank=rank, world_size=128)
        for rank in range(128)
    ]
    sizes = [[len(batch) for batch in order.batches(0)] for order in orders]
    assert all(len(own) == len(orders[0]) and min(own) >= 1 for own in sizes)
    assert sum(map(sum, sizes)) == samples
