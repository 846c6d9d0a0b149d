"""The game that an agent plays for :mod:`qtrain.allocate.reinforcement`: one step a layer, the reward at the end."""

from typing import Any, final

import gymnasium
import numpy as np
from numpy.typing import NDArray
from stable_baselines3 import DDPG
from stable_baselines3.common.noise import NormalActionNoise

from qtrain.allocate.feasible import Feasible
from qtrain.allocate.problem import Group

Vector = NDArray[np.float32]


LEAST, MOST = 1e-12, 1e6
"""Losses in nats are taken into these bounds before their logarithm is a reward; one that is not finite is the most."""


def learn(feasible: Feasible, *, episodes: int, startup: int, noise: float, seed: int) -> None:
    """Let a DDPG agent play ``episodes`` episodes; at the end of each a loss is measured."""
    game = BitEpisodes(feasible)
    steps = len(feasible.groups)
    agent = DDPG(
        "MlpPolicy",
        game,
        gamma=1.0,
        learning_starts=startup * steps,
        train_freq=(1, "episode"),
        gradient_steps=steps,
        batch_size=64,
        action_noise=NormalActionNoise(np.zeros(2), np.full(2, noise)),
        policy_kwargs={"net_arch": [64, 64]},
        seed=seed,
        device="cpu",
    )
    agent.learn(total_timesteps=episodes * steps)


@final
class BitEpisodes(gymnasium.Env[Vector, Vector]):
    """An episode goes once through the groups of layers; an action is (weight, input), each in -1 .. 1.

    -1 is the narrowest width and 1 the widest. The observation is the place in the network, the layer's largest share
    of each budget, how many widths there are, and the action before.
    """

    def __init__(self, feasible: Feasible) -> None:
        self._feasible = feasible
        self._static = _static(feasible)
        size = self._static.shape[1] + 2
        self.observation_space = gymnasium.spaces.Box(-1.0, 1.0, (size,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self._picks: list[int] = []
        self._last = np.zeros(2, np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Vector, dict[str, Any]]:
        """Begin at the first layer."""
        super().reset(seed=seed)
        self._picks, self._last = [], np.zeros(2, np.float32)
        return self._seen(), {}

    def step(self, action: Vector) -> tuple[Vector, float, bool, bool, dict[str, Any]]:
        """Choose the bits of one layer; after the last one the reward is ``-log(loss)``."""
        self._picks.append(option_of(self._feasible.groups[len(self._picks)], action))
        self._last = np.asarray(action, np.float32)
        done = len(self._picks) == len(self._feasible.groups)
        reward = self._reward() if done else 0.0
        return self._seen(), reward, done, False, {}

    def _reward(self) -> float:
        loss = self._feasible.loss(self._feasible.repaired(tuple(self._picks)))
        return -float(np.log(np.clip(loss, LEAST, MOST)))

    def _seen(self) -> Vector:
        place = min(len(self._picks), len(self._static) - 1)
        seen: Vector = np.concatenate([self._static[place], self._last]).astype(np.float32)
        return seen


def option_of(group: Group, action: Vector) -> int:
    """The option of ``group`` whose widths are nearest to ``action``, each role scaled from its least to its most."""

    def distance(bits: tuple[int, int]) -> float:
        total = 0.0
        for role in (0, 1):
            widths = sorted({one[role] for one in group.options})
            wanted = (float(action[role]) + 1) / 2 * (len(widths) - 1)
            total += (widths.index(bits[role]) - wanted) ** 2
        return total

    return min(range(len(group.options)), key=lambda option: distance(group.options[option]))


def _static(feasible: Feasible) -> Vector:
    """What does not change from episode to episode, (groups, features), each feature in -1 .. 1."""
    count = len(feasible.groups)
    rows = [
        [place / max(1, count - 1), *group.costs.max(axis=1), len(group.options)]
        for place, group in enumerate(feasible.groups)
    ]
    table = np.array(rows, dtype=np.float64)
    scaled: Vector = (table / np.maximum(np.abs(table).max(axis=0), 1e-12)).astype(np.float32)
    return scaled
