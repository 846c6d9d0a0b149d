"""Which weights of a ternary tensor are zero, and the factor of the others."""

import math

import torch
from torch import Tensor

from qtrain.functional.indicator import above


def usual_threshold(rows: Tensor) -> Tensor:
    """``0.7 mean |w|`` of each row: rows (G, n) float32 -> (G,) (TWN, arXiv 1605.04711, eq. 6); 0 for empty rows."""
    return 0.7 * rows.abs().sum(dim=1) / max(rows.shape[1], 1)


def best_ternary_threshold(rows: Tensor) -> Tensor:
    """The threshold above which to keep magnitudes so that ``||w - alpha t||`` is least: rows (G, n) -> (G,).

    Keeping the ``k`` largest magnitudes, with their mean as ``alpha``, leaves ``||w||^2 - (a_1 + ... + a_k)^2 / k``
    (arXiv 1605.04711, eq. 5), so that one sorting tries all thresholds. What is returned is the magnitude next below
    the kept ones, 0 if all are kept.
    """
    if rows.shape[1] == 0:
        return rows.new_zeros(rows.shape[0])
    sizes = rows.abs().sort(dim=1, descending=True).values
    following = torch.cat([sizes[:, 1:], torch.zeros_like(sizes[:, :1])], dim=1)
    counts = torch.arange(1, sizes.shape[1] + 1, device=rows.device, dtype=torch.float64)
    gained = sizes.cumsum(dim=1, dtype=torch.float64) / counts.sqrt()
    # Equal magnitudes are kept or dropped together: the gain is convex along them, so that no optimum is lost.
    kept = torch.where(sizes > following, gained, -math.inf).argmax(dim=1, keepdim=True)
    return following.gather(1, kept).squeeze(1)


def mean_above(rows: Tensor, threshold: Tensor) -> Tensor:
    """The mean of the magnitudes of each row above its threshold: (G, n), (G,) -> (G,); 0 where there are none."""
    magnitude = rows.abs()
    kept = above(magnitude, threshold.unsqueeze(1))
    return (magnitude * kept).sum(dim=1) / kept.sum(dim=1).clamp(min=1)
