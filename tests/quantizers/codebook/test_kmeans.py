"""Weight sharing by k-means: clusters against scikit-learn and exhaustive search, gradients summed by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans as Reference
from torch import Tensor

from qtrain.observers.min_max import MinMax
from qtrain.quantizers.codebook.kmeans import KMeans, lloyd
from qtrain.spec import PerBlock, PerChannel, PerTensor, QuantSpec

SHAPE = (6, 4, 3, 3)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def made(weight: Tensor, bits: int = 3, **options: object) -> KMeans:
    spec = QuantSpec(bits=bits, shape=tuple(weight.shape), signed=True)
    quantizer = KMeans(spec=spec, **options)  # type: ignore[arg-type]
    observer = MinMax(granularity=quantizer.granularity)
    observer.update(weight)
    quantizer.calibrate_(observer.observed(bits)._replace(tensor=weight))
    return quantizer


def least_error(values: list[float], count: int) -> float:
    """Of all ways to cut the sorted values into ``count`` runs, the least sum of squared distances to the means."""
    ordered = np.sort(values)
    cuts = itertools.combinations(range(1, len(ordered)), count - 1)
    return min(sum(((run - run.mean()) ** 2).sum() for run in np.split(ordered, cut)) for cut in cuts)


@pytest.mark.parametrize("count", [2, 5, 16])
def test_lloyd_matches_scikit_learn(count: int) -> None:
    x = torch.rand(400, generator=torch.Generator().manual_seed(0)).double() + 1  # dense: no cluster is ever empty
    start = np.linspace(float(x.min()), float(x.max()), count)[:, None]
    fitted = Reference(count, init=start, n_init=1, tol=0, max_iter=1000, algorithm="lloyd").fit(x[:, None].numpy())
    np.testing.assert_allclose(lloyd(x[None], count)[0].numpy(), np.sort(fitted.cluster_centers_[:, 0]), rtol=1e-9)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("count", [2, 4])
def test_separable_weights_reach_the_optimum(seed: int, count: int) -> None:
    centers = torch.arange(count).double() * 10
    x = (centers[:, None] + noise(count, 3, seed=seed).double()).reshape(1, -1)
    error = float((x[..., None] - lloyd(x, count)).square().amin(-1).sum())
    assert math.isclose(error, least_error(x[0].tolist(), count), rel_tol=1e-9)


@pytest.mark.parametrize("seed", range(10))
def test_lloyd_error_lies_between_even_spacing_and_the_optimum(seed: int) -> None:
    x = noise(1, 12, seed=seed).double()
    even = torch.linspace(float(x.min()), float(x.max()), 4, dtype=torch.float64)
    error = float((x[..., None] - lloyd(x, 4)).square().amin(-1).sum())
    assert least_error(x[0].tolist(), 4) <= error + 1e-12
    assert error < float((x[..., None] - even).square().amin(-1).sum())


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerBlock(2)])
def test_values_are_the_nearest_centroids_of_their_group(granularity: PerTensor | PerChannel | PerBlock) -> None:
    weight = noise(*SHAPE)
    quantizer = made(weight, granularity=granularity)
    tables = quantizer.codebook.detach().reshape(-1, 8)
    rows = granularity.flatten(weight)
    distance = (rows[:, :, None] - tables[:, None]).abs()
    nearest = tables.gather(1, distance.argmin(-1))
    torch.testing.assert_close(granularity.flatten(quantizer(weight).detach()), nearest)


@pytest.mark.parametrize("train", ["centroids", "both"])
def test_centroids_get_the_sum_of_their_members_gradients(train: str) -> None:
    """Equation 3: dL/dC_k = sum over ij of dL/dW_ij 1(I_ij = k)."""
    weight, upstream = noise(*SHAPE).requires_grad_(), noise(*SHAPE, seed=1)
    quantizer = made(weight.detach(), train=train)
    to_weight, to_codebook = torch.autograd.grad(quantizer(weight), [weight, quantizer.codebook], upstream)
    codes = quantizer.quantize(weight.detach()).codes
    expected = torch.stack([upstream[codes == k].double().sum() for k in range(8)])
    torch.testing.assert_close(to_codebook.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(to_weight, upstream if train == "both" else torch.zeros(SHAPE))


def test_a_weight_keeps_its_cluster_while_centroids_move() -> None:
    weight = noise(*SHAPE)
    quantizer = made(weight)
    before = quantizer.quantize(weight).codes
    with torch.no_grad():
        quantizer.codebook.add_(noise(8))
    assert torch.equal(quantizer.quantize(weight).codes, before)
    assert torch.equal(quantizer(weight), quantizer.codebook[before.long()])


def test_huffman_changes_only_the_size_of_codes() -> None:
    weight = noise(64, 64, 3, 3)
    plain, coded = (made(weight, bits=4, huffman=huffman).quantize(weight) for huffman in (False, True))
    counts = torch.bincount(plain.codes.reshape(-1), minlength=16).double()
    entropy = -(counts * (counts / counts.sum()).clamp(min=1e-300).log2()).sum()
    assert entropy <= coded.code_bits - 16 * 4 < entropy + weight.numel()
    assert coded.code_bits < plain.code_bits
    assert coded.nbits - coded.code_bits == plain.nbits - plain.code_bits == 16 * 32
    assert torch.equal(coded.dequantize(), plain.dequantize())


def test_wrong_options_are_refused() -> None:
    spec = QuantSpec(bits=4, shape=SHAPE, signed=True)
    with pytest.raises(ValueError, match="KMeans: train must be 'centroids' or 'both', got 'all'"):
        KMeans(spec=spec, train="all")
    with pytest.raises(ValueError, match="KMeans: quantizes weights only, not an input"):
        KMeans(spec=QuantSpec(bits=4))
    with pytest.raises(ValueError, match="KMeans: its tables were made for 4 bits and cannot become 3"):
        KMeans(spec=spec).set_range_(bits=3, signed=True)
