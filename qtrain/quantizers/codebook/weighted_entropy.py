"""Weighted entropy: clusters that balance the number of their weights against the importance of these."""

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from qtrain.functional.affine import require_finite
from qtrain.functional.levels import bucket
from qtrain.functional.ste import straight_through
from qtrain.quantizers.base import Quantizer, index_range
from qtrain.spec import Observed, PerTensor, QuantSpec
from qtrain.storage.base import NumberPart, QTensor
from qtrain.storage.codebook import look_up

_CANDIDATES = 256
_ROUNDS = 50


def cluster_entropy(sums: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """``-I P log P`` of the cluster of elements ``start .. end-1``; 0 where that is empty, -inf where ``end < start``.

    ``sums`` (n + 1,) float64 are the running sums of the importances; ``P = |C| / n`` is the cluster's share of the
    elements and ``I`` its mean importance (Park 2017, eq. 1 to 3), so that ``I P`` is its sum over n.
    """
    count = len(sums) - 1
    share = (end - start).double() / count
    entropy = (sums[start] - sums[end]) / count * share.clamp(min=0.5 / count).log()
    return torch.where(share < 0, -torch.inf, torch.where(share > 0, entropy, 0.0))


def best_cuts(importance: Tensor, clusters: int) -> Tensor:
    """Where to cut ``importance`` (n,), ascending, for the largest weighted entropy: (clusters - 1,) int64, ascending.

    Exact by dynamic programming for n up to 256; beyond that over 256 even positions, whose best is then improved as in
    the paper's algorithm 1: each cut to its best place between its neighbors, until none moves. Clusters may be empty.
    """
    n = len(importance)
    sums = torch.cat([importance.new_zeros(1, dtype=torch.float64), importance.double().cumsum(0)])
    places = torch.linspace(0, n, min(n, _CANDIDATES) + 1, dtype=torch.float64).round().long().to(importance.device)
    gains = cluster_entropy(sums, places[:, None], places[None])
    total, froms = gains[0], []
    for _ in range(clusters - 1):
        total, back = (total[:, None] + gains).max(dim=0)
        froms.append(back)
    last, cuts = torch.tensor(len(places) - 1, device=places.device), []
    for back in reversed(froms):
        last = back[last]
        cuts.append(int(places[last]))
    edges = [0, *reversed(cuts), n]
    for _ in range(_ROUNDS if n > _CANDIDATES else 0):
        before = list(edges)
        for j in range(1, clusters):
            low, high = torch.tensor(edges[j - 1]), torch.tensor(edges[j + 1])
            trial = torch.arange(edges[j - 1], edges[j + 1] + 1, device=importance.device)
            gain = cluster_entropy(sums, low, trial) + cluster_entropy(sums, trial, high)
            edges[j] = int(trial[gain.argmax()])
        if edges == before:
            break
    return torch.tensor(edges[1:-1], dtype=torch.int64, device=importance.device)


@final
class WeightedEntropy(Quantizer):
    """Clusters of weights by importance ``w^2``, ``2^(bits-1)`` of each sign, that maximize ``-sum I_k P_k log P_k``.

    Source: Park, Ahn, Yoo 2017, "Weighted-Entropy-Based Quantization for Deep Neural Networks" (CVPR), §3. A weight
    stands for ``+-sqrt(I_k)``, the root of its cluster's mean importance. Positive weights, with zero, and negative
    ones are clustered apart. Calibration finds the boundaries (:func:`best_cuts`), which stay; with ``update`` each
    training forward computes the representatives anew from the current weights. The gradient passes straight through.

    Weights only: the paper's activations have another method, a logarithmic one. The codebook's size depends on the
    bits: a change of bits needs a new conversion.
    """

    widths = range(1, 9)
    serves = frozenset({"weight"})
    keeps_zero = False
    switchable = False

    thresholds: Tensor
    codebook: Tensor

    def __init__(self, *, spec: QuantSpec, update: bool = True) -> None:
        super().__init__(spec=spec, granularity=PerTensor(), codes=index_range)
        self.update = update
        self.clusters = 2 ** (spec.bits - 1)
        values = (torch.arange(self.clusters) + 0.5) / self.clusters
        self.register_buffer("thresholds", ((values[1:] + values[:-1]) / 2).repeat(2, 1))
        self.register_buffer("codebook", torch.cat([values, -values]))

    def indices(self, x: Tensor) -> Tensor:
        """The cluster of each element, negative ones after the others: int64, shape and layout of ``x``."""
        size = x.detach().float().abs()
        other, negative = bucket(size, self.thresholds[0]), bucket(size, self.thresholds[1])
        return torch.where(x < 0, negative + self.clusters, other)

    @torch.no_grad()
    def represent_(self, x: Tensor, indices: Tensor) -> None:
        """Set each cluster's value from its members in ``x``; a cluster without members keeps what it has."""
        flat, squares = indices.reshape(-1), x.detach().double().square().reshape(-1)
        empty = torch.zeros(len(self.codebook), dtype=torch.float64, device=x.device)
        count = empty.index_put((flat,), torch.ones_like(squares), accumulate=True)
        size = (empty.index_put((flat,), squares, accumulate=True) / count.clamp(min=1)).sqrt()
        signed = torch.cat([size[: self.clusters], -size[self.clusters :]])
        self.codebook.copy_(torch.where(count > 0, signed, self.codebook))

    def fake_quantize(self, x: Tensor) -> Tensor:
        indices = self.indices(x)
        if self.training and self.update:
            self.represent_(x, indices)
        return straight_through(look_up(indices, self.codebook, self.granularity).to(x.dtype), x)

    def quantize(self, x: Tensor) -> QTensor:
        require_finite(x)
        return self.codebook_tensor(x, self.indices(x), self.codebook)

    @torch.no_grad()
    def calibrate_(self, observed: Observed) -> None:
        assert observed.tensor is not None
        weight = observed.tensor.float()
        for row, members in enumerate((weight[weight >= 0], -weight[weight < 0])):
            size = members.sort().values
            cuts = best_cuts(size.double().square(), self.clusters) if len(size) else size.new_zeros(0).long()
            # Half-way between neighbors; below zero and beyond the largest at the ends.
            padded = torch.cat([size.new_full((1,), -1.0), size, size[-1:]])
            self.thresholds[row] = (padded[cuts] + padded[cuts + 1]) / 2 if len(size) else 0.0
        indices = self.indices(weight)
        self.codebook.zero_()
        self.represent_(weight, indices)
        # What calibration left empty stands for the next smaller cluster, for values that were not seen.
        positive, negative = self.codebook.reshape(2, -1)
        self.codebook.copy_(torch.cat([positive.cummax(0).values, negative.cummin(0).values]))
        self.initialized.fill_(True)

    def stored_state(self) -> Mapping[str, NumberPart]:
        return {}
