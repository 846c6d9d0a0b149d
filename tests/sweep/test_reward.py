"""MnasNet's reward: by hand, soft and hard, and what is refused."""

import pytest

from qtrain.config.compose import compose
from qtrain.settings.sweep_settings import RewardSettings
from qtrain.sweep.make_search import objectives_of
from qtrain.sweep.reward import with_reward
from qtrain.utils.errors import ConfigError


def test_the_soft_reward_loses_five_percent_where_the_cost_doubles() -> None:
    """MnasNet chose -0.07 so that twice the latency is worth 5 % relative accuracy: 2^-0.07 = 0.9526."""
    reward = RewardSettings(cost="bops", target=1e9, below=-0.07, above=-0.07)
    assert with_reward({"top1": 80.0, "bops": 2e9}, reward)["reward"] == pytest.approx(80 * 0.952638, rel=1e-5)
    assert with_reward({"top1": 80.0, "bops": 1e9}, reward)["reward"] == 80.0
    assert with_reward({"top1": 80.0, "bops": 5e8}, reward)["reward"] == pytest.approx(80 / 0.952638, rel=1e-5)


def test_the_hard_reward_is_the_accuracy_up_to_the_target() -> None:
    reward = RewardSettings(cost="size_bytes", target=1000.0, below=0.0, above=-1.0)
    assert with_reward({"top1": 80.0, "size_bytes": 10.0}, reward)["reward"] == 80.0
    assert with_reward({"top1": 80.0, "size_bytes": 4000.0}, reward)["reward"] == 20.0


def test_without_a_target_or_an_accuracy_nothing_is_added() -> None:
    none = RewardSettings(cost="bops", target=None, below=-0.07, above=-0.07)
    assert with_reward({"top1": 80.0, "bops": 2e9}, none) == {"top1": 80.0, "bops": 2e9}
    assert "reward" not in with_reward({"bops": 2e9}, RewardSettings(cost="bops", target=1e9, below=0.0, above=-1.0))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["+sweep.objectives.reward=max"], r"sweep\.objectives\.reward: needs sweep\.reward\.target"),
        (["sweep.reward.target=0"], r"sweep\.reward\.target: must be above 0, got 0"),
        (["sweep.reward.target=-1"], r"sweep\.reward\.target: must be above 0, got -1"),
        (["sweep.reward.target=nan"], r"sweep\.reward\.target: must be above 0, got nan"),
        (["sweep.reward.cost=latency"], r"sweep\.reward\.cost: must be one of size_bytes, .* got 'latency'"),
    ],
)
def test_a_reward_that_cannot_be_is_refused(more: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        objectives_of(compose(more))
