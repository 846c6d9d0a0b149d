"""Labels that stand in one column, beside the values that they name, and keep clear of each other."""

from collections.abc import Sequence

import numpy as np


def spread(values: Sequence[float], *, distance: float, low: float, high: float) -> list[float]:
    """Places from ``low`` to ``high`` for labels of ascending ``values``, ``distance`` apart, as near as can be.

    The sum of squared ways is least: labels that would overlap stand evenly around the middle of theirs. Where not all
    have room, they stand evenly from ``low`` to ``high``; :func:`bundles` says which to join before.

    >>> spread([0.0, 1.0, 1.0, 9.0], distance=2.0, low=0.0, high=8.0)
    [0.0, 2.0, 4.0, 8.0]
    """
    if len(values) > 1:
        distance = min(distance, (high - low) / (len(values) - 1))
    # Without the distances the places only have to ascend: neighbors that do not are pooled to their mean.
    pools: list[tuple[float, int]] = []
    for place, value in enumerate(values):
        pool, count = value - place * distance, 1
        while pools and pools[-1][0] > pool:
            other, others = pools.pop()
            pool, count = (pool * count + other * others) / (count + others), count + others
        pools.append((pool, count))
    most = high - (len(values) - 1) * distance
    found = [min(max(pool, low), most) for pool, count in pools for _ in range(count)]
    return [place + number * distance for number, place in enumerate(found)]


def bundles(count: int, most: int) -> list[range]:
    """``count`` neighbors as at most ``most`` bundles of about equal numbers, each to have one label.

    >>> bundles(5, 2), bundles(2, 9)
    ([range(0, 3), range(3, 5)], [range(0, 1), range(1, 2)])
    """
    if not count:
        return []
    parts = np.array_split(np.arange(count), min(count, most))
    return [range(int(part[0]), int(part[-1]) + 1) for part in parts]


def bundle_text(texts: Sequence[str]) -> str:
    """The label of a bundle: its words, or the first and the last of many.

    >>> bundle_text(["4"]), bundle_text(["4", "5"]), bundle_text(["4", "5", "6"])
    ('4', '4, 5', '4 … 6')
    """
    return ", ".join(texts) if len(texts) < 3 else f"{texts[0]} … {texts[-1]}"
