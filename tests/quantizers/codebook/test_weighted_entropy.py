"""Weighted entropy: the boundaries against all boundaries, the representatives by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from qtrain.observers.min_max import MinMax
from qtrain.quantizers.codebook.weighted_entropy import WeightedEntropy, best_cuts
from qtrain.spec import PerTensor, QuantSpec


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def entropy(importance: list[float], cuts: tuple[int, ...]) -> float:
    """S = -sum_k I_k P_k log P_k as the paper writes it, cluster after cluster."""
    total = 0.0
    for start, end in itertools.pairwise((0, *cuts, len(importance))):
        if end > start:
            share = (end - start) / len(importance)
            total -= sum(importance[start:end]) / (end - start) * share * math.log(share)
    return total


def made(weight: Tensor, bits: int = 3, **options: bool) -> WeightedEntropy:
    quantizer = WeightedEntropy(spec=QuantSpec(bits=bits, shape=tuple(weight.shape), signed=True), **options)
    observer = MinMax(granularity=PerTensor())
    observer.update(weight)
    quantizer.calibrate_(observer.observed(bits)._replace(tensor=weight))
    return quantizer


def test_entropy_by_hand() -> None:
    """Importances 1, 1, 4 cut before the 4: -(1 2/3 log 2/3 + 4 1/3 log 1/3)."""
    assert math.isclose(entropy([1, 1, 4], (2,)), -(2 / 3 * math.log(2 / 3) + 4 / 3 * math.log(1 / 3)))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("clusters", [1, 2, 3, 4])
def test_best_cuts_maximize_the_entropy(seed: int, clusters: int) -> None:
    importance = noise(11, seed=seed).double().square().sort().values
    values = importance.tolist()
    most = max(entropy(values, cuts) for cuts in itertools.combinations_with_replacement(range(12), clusters - 1))
    assert entropy(values, tuple(best_cuts(importance, clusters).tolist())) == pytest.approx(most, rel=1e-12)


def test_large_tensors_reach_nearly_the_optimum() -> None:
    """3000 weights and three clusters: every pair of boundaries, tried."""
    importance = noise(3000).double().square().sort().values
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), importance.cumsum(0)])
    place = torch.arange(3001)

    def gain(start: Tensor, end: Tensor) -> Tensor:
        share = (end - start) / 3000
        return torch.where(share > 0, -(sums[end] - sums[start]) / 3000 * share.clamp(min=1e-9).log(), 0.0)

    first, second = place[:, None], place[None]
    every = gain(torch.tensor(0), first) + gain(first, second) + gain(second, torch.tensor(3000))
    most = every.masked_fill(second < first, -1.0).max().item()
    assert entropy(importance.tolist(), tuple(best_cuts(importance, 3).tolist())) >= most * (1 - 1e-6)


def test_a_weight_stands_for_the_root_mean_square_of_its_cluster() -> None:
    weight = noise(8, 4, 3, 3)
    quantizer = made(weight).eval()
    values = quantizer(weight)
    codes = quantizer.quantize(weight).codes
    assert torch.equal(values < 0, weight < 0)
    for code in codes.unique():
        members = weight[codes == code].double()
        sign = -1 if code >= 4 else 1
        assert values[codes == code].unique().item() == pytest.approx(sign * members.square().mean().sqrt().item())
    positive = weight[weight >= 0].sort().values
    cuts = torch.searchsorted(positive, quantizer.thresholds[0])
    assert torch.equal(cuts, best_cuts(positive.double().square(), 4))


def test_one_bit_is_one_value_of_each_sign() -> None:
    weight = torch.tensor([3.0, -1.0, 4.0, -2.0])
    expected = torch.tensor([12.5**0.5, -(2.5**0.5), 12.5**0.5, -(2.5**0.5)])
    torch.testing.assert_close(made(weight, bits=1).eval()(weight), expected)


def test_important_weights_get_finer_clusters_than_their_share() -> None:
    """What the method is for: of a bell-shaped weight the cluster near zero holds the most weights."""
    quantizer = made(noise(64, 64))
    counts = torch.bincount(quantizer.quantize(noise(64, 64)).codes.reshape(-1), minlength=8).reshape(2, 4)
    assert (counts[:, 0] > counts[:, 1:].amax(1)).all()


@pytest.mark.parametrize("update", [True, False])
def test_representatives_follow_the_weights_in_training(update: bool) -> None:
    weight = noise(8, 4, 3, 3)
    quantizer = made(weight, update=update)
    before, thresholds = quantizer.codebook.clone(), quantizer.thresholds.clone()
    moved = (weight * 1.01).requires_grad_()
    output = quantizer.train()(moved)
    assert torch.equal(quantizer.codebook, before) is not update
    assert torch.equal(quantizer.thresholds, thresholds)
    assert torch.equal(output, quantizer.eval()(moved))
    upstream = noise(8, 4, 3, 3, seed=1)
    (grad,) = torch.autograd.grad(output, moved, upstream)
    assert torch.equal(grad, upstream)


def test_inputs_and_other_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="WeightedEntropy: quantizes weights only, not an input"):
        WeightedEntropy(spec=QuantSpec(bits=4))
    with pytest.raises(ValueError, match=r"WeightedEntropy: bits must be 1\.\.8, got 9"):
        WeightedEntropy(spec=QuantSpec(bits=9, shape=(4, 4), signed=True))
