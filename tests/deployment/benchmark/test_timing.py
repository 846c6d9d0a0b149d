"""Networks take turns, and ratios are of the same round."""

import pytest

from qtrain.deployment.benchmark.timing import Spread, in_turns, ratio


class FakeRuntime:
    """Calls that are written down and move a clock by known times."""

    def __init__(self, **seconds: list[float]) -> None:
        self.now, self.called, self._seconds = 0.0, "", seconds

    def call(self, name: str) -> None:
        number = self.called.count(name)
        self.called += name
        # The first call of each pair takes long, as with cold caches.
        self.now += self._seconds[name][number // 2] if number % 2 else 100.0


def test_networks_take_turns_and_each_round_begins_with_another_one() -> None:
    fake = FakeRuntime(a=[1.0, 2.0, 3.0, 4.0], b=[10.0, 20.0, 30.0, 40.0], c=[5.0] * 4)
    calls = {name: lambda name=name: fake.call(name) for name in "abc"}
    times = in_turns(calls, rounds=4, clock=lambda: fake.now)
    assert fake.called == "aabbcc" + "bbccaa" + "ccaabb" + "aabbcc"
    assert times == {"a": [1.0, 2.0, 3.0, 4.0], "b": [10.0, 20.0, 30.0, 40.0], "c": [5.0] * 4}


def test_a_ratio_is_of_the_same_round_so_that_a_busy_machine_does_not_count() -> None:
    times = {"export": [1.0, 50.0, 1.0, 2.0, 1.0], "other": [2.0, 100.0, 2.0, 2.0, 4.0]}
    assert ratio(times, "export", "other") == Spread(0.5, 0.5, 0.5)
    assert ratio(times, "other", "export") == Spread(2.0, 2.0, 2.0)


def test_quartiles_lie_between_the_values() -> None:
    assert Spread.of([5.0, 1.0, 2.0, 3.0, 4.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([1.0, 2.0]) * 1000 == Spread(1500.0, 1250.0, 1750.0)


def test_one_round_has_no_quartiles() -> None:
    with pytest.raises(ValueError, match="quartiles need at least 2 values, got 1"):
        Spread.of([1.0])
