"""Weight sharing by k-means (Deep Compression): every weight of a layer is one of K centroids."""

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor, nn

from qtrain.functional.affine import require_finite
from qtrain.functional.levels import bucket
from qtrain.functional.ste import gradient_also_to
from qtrain.quantizers.base import Quantizer, index_range
from qtrain.spec import Granularity, Observed, PerTensor, QuantSpec
from qtrain.storage.base import NumberPart, QTensor
from qtrain.storage.codebook import look_up

MOST_LLOYD_ITERATIONS = 1000


def lloyd(rows: Tensor, count: int) -> Tensor:
    """``count`` centroids of each row of ``rows`` (G, n), ascending, (G, count) float64.

    Lloyd's iterations to their end, from centroids spaced evenly between a row's smallest and largest value (linear
    initialization, §3.2, which keeps the few large weights represented). A cluster without members stays where it is.
    """
    ordered = rows.to(torch.float64).contiguous().sort(dim=1).values
    sums = torch.cat([torch.zeros_like(ordered[:, :1]), ordered.cumsum(dim=1)], dim=1)
    first, last = ordered[:, :1], ordered[:, -1:]
    centroids = first + (last - first) * torch.linspace(0, 1, count, dtype=torch.float64, device=rows.device)
    start, end = torch.zeros_like(first, dtype=torch.int64), torch.full_like(first, rows.shape[1], dtype=torch.int64)
    for _ in range(MOST_LLOYD_ITERATIONS):
        inner = torch.searchsorted(ordered, midpoints(centroids), right=True)
        edges = torch.cat([start, inner, end], dim=1)
        members = edges.diff(dim=1)
        moved = torch.where(members > 0, sums.gather(1, edges).diff(dim=1) / members, centroids)
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return centroids


def midpoints(centroids: Tensor) -> Tensor:
    """Where the nearest centroid changes: (..., K) ascending to (..., K - 1)."""
    return (centroids[..., :-1] + centroids[..., 1:]) / 2


@final
class KMeans(Quantizer):
    """``x^ = codebook[code(x)]``, ``2^bits`` centroids for a tensor or group (Han et al. 2016, arXiv 1510.00149, §3).

    Calibration clusters the weight with :func:`lloyd` and keeps the clusters' boundaries; training moves the centroids,
    each by the sum of its members' gradients (eq. 3). ``train: centroids`` gives the weights themselves no gradient, so
    that, boundaries being fixed, each keeps its cluster as in the paper; ``both`` lets their gradient straight through
    as well, and they may change cluster. ``huffman`` stores the codes in a Huffman code (§4), which shows in sizes.

    The codebook's size depends on the bits: a change of bits needs a new conversion.
    """

    widths = range(1, 9)
    serves = frozenset({"weight"})
    keeps_zero = False
    switchable = False

    boundaries: Tensor

    def __init__(
        self,
        *,
        spec: QuantSpec,
        granularity: Granularity = PerTensor(),  # noqa: B008 - frozen
        train: str = "centroids",
        huffman: bool = False,
    ) -> None:
        if train not in ("centroids", "both"):
            raise ValueError(f"KMeans: train must be 'centroids' or 'both', got {train!r}")
        super().__init__(spec=spec, granularity=granularity, codes=index_range)
        vars(self).update(moves_weight=train == "both")
        self.huffman = huffman
        start = torch.linspace(-1, 1, 2**spec.bits).expand(*self.state_shape, -1).clone()
        self.codebook = nn.Parameter(start)
        self.register_buffer("boundaries", midpoints(start))

    def indices(self, x: Tensor) -> Tensor:
        """The cluster of each element: int64, shape and layout of ``x``."""
        values = x.detach().float()
        if self.boundaries.ndim == 1:
            return bucket(values, self.boundaries)
        rows = self.granularity.flatten(values).contiguous()
        ranks = torch.searchsorted(self.boundaries.flatten(0, -2), rows)
        # Elements of rows return to the places that they came from, for every granularity.
        places = self.granularity.flatten(torch.arange(x.numel(), device=x.device).reshape(x.shape))
        flat = torch.empty_like(ranks.reshape(-1)).scatter(0, places.reshape(-1), ranks.reshape(-1))
        return torch.empty_like(x, dtype=torch.int64).copy_(flat.reshape(x.shape))

    def fake_quantize(self, x: Tensor) -> Tensor:
        # In float64, because there the members' gradients add up in the same order on every run.
        values = look_up(self.indices(x), self.codebook.double(), self.granularity).to(x.dtype)
        return gradient_also_to(values, x if self.moves_weight else x * 0)

    def quantize(self, x: Tensor) -> QTensor:
        require_finite(x)
        return self.codebook_tensor(x, self.indices(x), self.codebook, huffman=self.huffman)

    @torch.no_grad()
    def calibrate_(self, observed: Observed) -> None:
        assert observed.tensor is not None
        rows = self.granularity.flatten(observed.tensor.float())
        self.codebook.copy_(lloyd(rows, self.codebook.shape[-1]).reshape(self.codebook.shape))
        self.boundaries.copy_(midpoints(self.codebook))
        self.initialized.fill_(True)

    def stored_state(self) -> Mapping[str, NumberPart]:
        return {}
