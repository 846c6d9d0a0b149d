"""Product quantization: blocks of a weight are vectors of a codebook; iPQ takes layer after layer."""

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor, nn

from qtrain.functional.affine import require_finite
from qtrain.functional.precision import full_precision
from qtrain.functional.random import keyed_uniform
from qtrain.functional.ste import gradient_also_to, scale_gradient
from qtrain.quantizers.base import Quantizer, index_range
from qtrain.quantizers.hooks import checked_share
from qtrain.spec import Observed, PerTensor, QuantSpec
from qtrain.storage.base import NumberPart, QTensor
from qtrain.storage.product import ProductTensor, join_blocks

MOST_CLUSTER_ITERATIONS = 100
NOISE = 1e-3
"""Distance of the two halves of a split cluster, relative to the codebook's largest value."""


def nearest_vector(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest of ``codebook`` (K, d) for each of ``vectors`` (n, d): (n,) int64.

    ``argmin_k |c_k|^2 / 2 - v c_k``, which leaves out the vector's own square; in units of the codebook's largest
    value, so that squares neither vanish nor overflow.
    """
    largest = codebook.abs().amax()
    unit = torch.where(largest > 0, largest, 1.0)
    scaled = codebook / unit
    with full_precision(vectors):
        return (scaled.square().sum(dim=1) / 2 - (vectors / unit) @ scaled.T).argmin(dim=1)


def members(indices: Tensor, count: int) -> Tensor:
    """How many of ``indices`` (n,) are each of ``0 .. count-1``: (count,) float32."""
    ones = torch.ones_like(indices, dtype=torch.float32)
    return torch.zeros(count, device=indices.device, dtype=ones.dtype).scatter_add(0, indices, ones)


def lloyd_step(vectors: Tensor, codebook: Tensor, key: int) -> Tensor:
    """One iteration of k-means: the means of the clusters of ``codebook`` (K, d); empty clusters split full ones.

    As in Stock et al. (arXiv 1907.05686, §3.2) an empty cluster takes the centroid of the most populated one, ``c``:
    they go on as ``c + e`` and ``c - e`` with random ``e``, which ``key`` determines.
    """
    count = len(codebook)
    indices = nearest_vector(vectors, codebook)
    sizes = members(indices, count)
    sums = torch.zeros_like(codebook, dtype=torch.float64).index_put((indices,), vectors.double(), accumulate=True)
    means = torch.where(sizes[:, None] > 0, sums / sizes[:, None].clamp(min=1), codebook).to(codebook.dtype)
    empty = (sizes == 0).nonzero()[:, 0]
    # The most populated ones that have members to give away; not more of them than there are empty ones.
    largest = sizes.argsort(descending=True, stable=True)
    split = largest[: min(len(empty), int((sizes > 1).sum()))]
    empty = empty[: len(split)]
    draws = keyed_uniform(torch.tensor(key, device=vectors.device), (len(split), vectors.shape[1]))
    noise = (2 * draws - 1) * NOISE * vectors.abs().amax()
    centers = means[split]
    return means.index_copy(0, empty, centers + noise).index_copy(0, split, centers - noise)


def cluster(vectors: Tensor, count: int) -> Tensor:
    """A codebook (count, d) for ``vectors`` (n, d): k-means from ``count`` of the vectors, drawn at random.

    If there are at most ``count`` different vectors, they are the codebook, filled up with zeros.
    """
    distinct: Tensor = vectors.unique(dim=0)
    if len(distinct) <= count:
        return torch.cat([distinct, distinct.new_zeros(count - len(distinct), vectors.shape[1])])
    order = keyed_uniform(torch.zeros((), dtype=torch.int64, device=vectors.device), (len(distinct),)).argsort()
    codebook = distinct[order[:count]]
    for iteration in range(MOST_CLUSTER_ITERATIONS):
        moved = lloyd_step(vectors, codebook, iteration)
        if torch.equal(moved, codebook):
            break
        codebook = moved
    return codebook


def default_block(shape: tuple[int, ...]) -> int:
    """Values of a block as the paper has it: a whole kernel, kh kw; else the largest of 4, 3, 2, 1 that fits."""
    kernel, row = torch.Size(shape[2:]).numel(), torch.Size(shape[1:]).numel()
    return kernel if kernel > 1 else next(size for size in (4, 3, 2, 1) if row % size == 0)


@final
class Product(Quantizer):
    """Blocks of ``block`` neighboring values of an output channel, each the nearest of ``2^bits`` learned vectors.

    Source: Stock et al. 2020, "And the bit goes down" (arXiv 1907.05686); Fan et al. 2020, iPQ (arXiv 2004.07320,
    §3.2). Calibration takes the weight's own error for the objective, :meth:`cluster_by_` their error of the layer's
    output. ``bits`` are those of an
    index, so that a weight takes ``bits / block``, besides the codebook. A weight (O, I, kh, kw) is cut along its I kh
    kw values; ``block`` 0 stands for the paper's choice: kh kw, or for 1x1 kernels the largest of 4, 3, 2, 1 that fits.

    Calibration clusters the blocks; training moves each codebook vector by the mean of its members' gradients (iPQ, eq.
    5). The calibrated codebook (``anchors``) decides which vector a block takes, so that blocks keep their vector while
    the weights do not change: ``train: centroids`` gives the weights no gradient; ``both`` lets it through.

    ``start`` is the share of training up to which the layer is left in full precision. Until then its weights learn,
    and the codebook follows them by one iteration of k-means after each optimizer step. Layers with ascending ``start``
    are thus quantized one after the other, as in iPQ. Eval mode is always quantized.

    The codebook's size depends on the bits: a change of bits needs a new conversion.
    """

    widths = range(1, 13)
    serves = frozenset({"weight"})
    keeps_zero = False
    switchable = False

    anchors: Tensor
    metric: Tensor
    active: Tensor

    def __init__(self, *, spec: QuantSpec, block: int = 0, train: str = "centroids", start: float = 0.0) -> None:
        if train not in ("centroids", "both"):
            raise ValueError(f"Product: train must be 'centroids' or 'both', got {train!r}")
        if block < 0:
            raise ValueError(f"Product: block must be at least 1, or 0 for the kernel's size, got {block}")
        checked_share("Product", "start", start)
        super().__init__(spec=spec, granularity=PerTensor(), codes=index_range)
        self.block = block or default_block(spec.shape)
        row = torch.Size(spec.shape[1:]).numel()
        if row % self.block:
            divisors = [n for n in range(1, row + 1) if row % n == 0]
            raise ValueError(
                f"Product: block {self.block} does not divide the {row} values of an output channel; use one of "
                f"{divisors}, or give this layer a policy of its own"
            )
        self.train_weights = train == "both"
        vars(self).update(moves_weight=self.train_weights or start > 0)
        self.start = start
        self.following = start > 0
        # Different vectors (multiples of ones), so that a new quantizer works before its calibration.
        begin = torch.linspace(-1, 1, 2**spec.bits)[:, None].repeat(1, self.block)
        self.codebook = nn.Parameter(begin)
        self.register_buffer("anchors", begin.clone())
        self.register_buffer("metric", torch.eye(self.block))
        self.register_buffer("active", torch.tensor(start <= 0))

    def vectors(self, x: Tensor) -> Tensor:
        """The blocks of ``x``, (O R / d, d) float32."""
        return x.detach().to(self.codebook.dtype).reshape(x.numel() // self.block, self.block)

    def indices(self, x: Tensor) -> Tensor:
        """Which vector each block takes: (O R / d,) int64."""
        return nearest_vector(self._measured(self.vectors(x)), self._measured(self.anchors))

    def fake_quantize(self, x: Tensor) -> Tensor:
        indices = self.indices(x)
        each = members(indices, len(self.codebook)).clamp(min=1).reciprocal()
        # In float64, because there the members' gradients add up in the same order on every run.
        codebook = scale_gradient(self.codebook.double(), each[:, None])
        values = torch.empty_like(x).copy_(join_blocks(indices, codebook, tuple(x.shape)).to(x.dtype))
        result = gradient_also_to(values, x if self.train_weights else x * 0)
        return torch.where(self.active, result, x) if self.training else result

    def quantize(self, x: Tensor) -> QTensor:
        require_finite(x)
        return ProductTensor(
            codes=self.indices(x).to(torch.int32).reshape(x.shape[0], x.shape[1:].numel() // self.block),
            bits=int(self.bits),
            low=int(self.code_low),
            high=int(self.code_high),
            dtype=x.dtype,
            codebook=self.codebook.detach().clone(),
            shape=tuple(x.shape),
        )

    @torch.no_grad()
    def calibrate_(self, observed: Observed) -> None:
        assert observed.tensor is not None
        self.anchors.copy_(cluster(self.vectors(observed.tensor), len(self.codebook)))
        self.codebook.copy_(self.anchors)
        self.initialized.fill_(True)

    @torch.no_grad()
    def cluster_by_(self, weight: Tensor, gram: Tensor) -> None:
        """Cluster the blocks of ``weight`` anew, and from now on choose vectors, by ``(v - c)^T G (v - c)``.

        ``gram`` G (d, d), positive definite, is that of the d inputs that a block multiplies, so that this is the
        squared error of the products (arXiv 1907.05686, eq. 3 to 5). With ``G = L L^T`` it is k-means of ``v L``.
        """
        self.metric.copy_(torch.linalg.cholesky(gram.double()))
        self.anchors.copy_(self._back(cluster(self._measured(self.vectors(weight)), len(self.codebook))))
        self.codebook.copy_(self.anchors)

    def _measured(self, vectors: Tensor) -> Tensor:
        """``v L``, whose squared distances are the objective."""
        with full_precision(vectors):
            return vectors @ self.metric

    def _back(self, vectors: Tensor) -> Tensor:
        """``v`` for ``v L``."""
        found: Tensor = torch.linalg.solve_triangular(self.metric.double(), vectors.double(), upper=False, left=False)
        return found

    def begin_step_(self, *, progress: float, key: int) -> None:
        self.following = progress < self.start
        self.active.fill_(not self.following)

    @torch.no_grad()
    def project(self, weight: Tensor) -> Tensor:
        """The weight as it is; while this layer is not yet quantized, its codebook follows the weight."""
        if self.following:
            moved = lloyd_step(self._measured(self.vectors(weight)), self._measured(self.anchors), 0)
            self.anchors.copy_(self._back(moved))
            self.codebook.copy_(self.anchors)
        return weight

    def stored_state(self) -> Mapping[str, NumberPart]:
        return {}
