"""One number of accuracy and cost: MnasNet's reward (Tan et al., arXiv 1807.11626, eq. 2 and 3)."""

from collections.abc import Mapping

from qtrain.settings.sweep_settings import RewardSettings

REWARD = "reward"
"""The metric's name, for ``sweep.objectives``."""


def with_reward(metrics: Mapping[str, float], reward: RewardSettings) -> dict[str, float]:
    """``metrics`` with ``reward = top1 (cost / target)^w``, ``w`` being ``below`` or ``above``.

    Up to the target ``below`` counts, over it ``above``. Without a target, or where the cost or the accuracy is not
    known yet, they stay as they are.

    >>> settings = RewardSettings(cost="bops", target=1e9, below=0.0, above=-1.0)
    >>> with_reward({"top1": 90.0, "bops": 2e9}, settings)["reward"]
    45.0
    >>> with_reward({"top1": 90.0, "bops": 5e8}, settings)["reward"]
    90.0
    """
    if reward.target is None or not {"top1", reward.cost} <= metrics.keys():
        return dict(metrics)
    share = metrics[reward.cost] / reward.target
    return {**metrics, REWARD: metrics["top1"] * share ** (reward.below if share <= 1 else reward.above)}
