"""What runs of one process share: values that none of them changes, and random numbers as if made anew."""

from __future__ import annotations

import threading

import pytest
import torch

from qtrain.pipeline.run_cache import RunCache, cached, run_cache_in


class Maker:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> torch.Tensor:
        self.calls += 1
        return torch.rand(3)


def made(maker: Maker, key: str = "a") -> tuple[torch.Tensor, torch.Tensor]:
    """The value, and the random number that comes after it."""
    torch.manual_seed(7)
    value = cached("kind", {"key": key}, maker)
    return value, torch.rand(1)


def test_a_kept_value_is_what_making_it_gives_and_so_is_what_follows() -> None:
    alone = made(Maker())
    maker = Maker()
    with run_cache_in(RunCache()):
        for _ in range(3):
            assert all(torch.equal(one, two) for one, two in zip(made(maker), alone, strict=True))
    assert maker.calls == 1


def test_nobody_changes_what_is_kept() -> None:
    maker = Maker()
    with run_cache_in(RunCache()):
        first, _ = made(maker)
        expected = first.clone()
        first.zero_()
        assert torch.equal(made(maker)[0], expected)


def test_another_key_or_other_random_numbers_are_made_anew() -> None:
    maker = Maker()
    with run_cache_in(RunCache()):
        made(maker)
        made(maker, "b")
        torch.manual_seed(8)
        cached("kind", {"key": "a"}, maker)
    assert maker.calls == 3


def test_those_asked_for_last_stay() -> None:
    maker = Maker()
    with run_cache_in(RunCache(most=2)):
        for key in ("a", "b", "a", "c", "a"):
            made(maker, key)
        assert maker.calls == 3
        made(maker, "b")
        assert maker.calls == 4


def test_a_run_alone_keeps_nothing_nor_does_another_thread() -> None:
    maker = Maker()
    made(maker)
    made(maker)
    assert maker.calls == 2
    with run_cache_in(RunCache()):
        made(maker)
        thread = threading.Thread(target=made, args=(maker,))
        thread.start()
        thread.join()
        assert maker.calls == 4
    with pytest.raises(ValueError, match="RunCache: most must be at least 1, got 0"):
        RunCache(most=0)


def test_values_take_no_more_bytes_than_they_may_and_those_asked_for_last_stay() -> None:
    maker, store = Maker(), RunCache(most_bytes=30)  # a value has 12
    with run_cache_in(store):
        for key in ("a", "b", "a", "c", "a"):
            made(maker, key)
            assert store.bytes <= 30
        assert (maker.calls, store.bytes) == (3, 24)
        made(maker, "b")
    assert maker.calls == 4


def test_a_value_too_large_is_made_each_time_and_leaves_the_others() -> None:
    small, large, store = Maker(), Maker(), RunCache(most_bytes=30)

    def ten() -> torch.Tensor:
        large.calls += 1
        return torch.ones(10)

    with run_cache_in(store):
        made(small)
        for _ in range(2):
            assert torch.equal(cached("large", {}, ten), torch.ones(10))
        made(small)
    assert (small.calls, large.calls, store.bytes) == (1, 2, 12)
