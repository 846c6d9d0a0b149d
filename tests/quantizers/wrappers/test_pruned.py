"""Pruning: which weights go, that they stay away in training, what is calibrated on the rest, and the exact size."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qtrain.nn import QuantLinear
from qtrain.nn.project import project_weights_
from qtrain.observers.min_max import MinMax
from qtrain.ptq.rounding.squant import SQuant
from qtrain.quantizers.codebook.kmeans import KMeans, lloyd
from qtrain.quantizers.codebook.product import Product
from qtrain.quantizers.uniform.affine import Affine
from qtrain.quantizers.uniform.lsq import LSQ
from qtrain.quantizers.wrappers.pruned import Pruned, survivors_everywhere
from qtrain.spec import Observed, PerChannel, PerTensor, QuantSpec
from qtrain.storage.base import pack
from qtrain.storage.sparse import SparseTensor


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def calibrated(x: Tensor, *, bits: int = 4, quantizer: Any = Affine, **options: Any) -> Pruned:
    made = Pruned(spec=QuantSpec(bits=bits, shape=tuple(x.shape), signed=True), quantizer=quantizer, **options)
    return on(made, x)


def on(made: Any, x: Tensor) -> Any:
    observer = MinMax(granularity=made.granularity)
    observer.update(x)
    made.calibrate_(observer.observed(int(made.bits))._replace(tensor=x))
    return made


def test_a_weight_by_hand() -> None:
    """Three of six go; the others span 3.5 in 3 bits, a step of 3.5 / 3."""
    x = torch.tensor([[1.0, -3.5, 0.9], [0.2, 2.0, 0.0]])
    made = calibrated(x, bits=3, share=0.5)
    assert made.kept.tolist() == [[True, True, False], [False, True, False]]
    torch.testing.assert_close(made(x), torch.tensor([[3.5 / 3, -3.5, 0.0], [0.0, 7 / 3, 0.0]]))
    stored = made.quantize(x)
    assert isinstance(stored, SparseTensor)
    assert stored.codes.tolist() == [1, -3, 2]
    assert stored.gaps.tolist() == [0, 0, 2]
    assert stored.nbits == 3 * 3 + 3 * 4 + 32
    assert len(pack(stored)) == 7


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_requested_share_of_smallest_weights_is_pruned(share: float) -> None:
    x = noise(7, 11)
    made = calibrated(x, share=share)
    assert int((~made.kept).sum()) == round(share * 77)
    assert x[~made.kept].abs().max() <= x[made.kept].abs().min() if share else made.kept.all()


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerChannel(1)], ids=str)
def test_inner_quantizer_is_calibrated_on_remaining_weights(granularity: Any) -> None:
    x = noise(6, 8)
    made = calibrated(x, share=0.6, quantizer=partial(Affine, granularity=granularity))
    rest = torch.where(made.kept, x, 0.0)
    assert isinstance(made.inner, Affine)
    reach = granularity.flatten(rest).abs().amax(dim=1).reshape(made.inner.scale.shape)
    expected = torch.where(reach > 0, reach / 7, 1.0)
    torch.testing.assert_close(made.inner.scale, expected)
    filled = survivors_everywhere(x, made.kept, granularity)
    assert torch.equal(filled[made.kept], x[made.kept])
    for row, kept in zip(granularity.flatten(filled), granularity.flatten(made.kept), strict=True):
        counts = [int((row == value).sum()) for value in row[kept]]
        assert max(counts, default=0) - min(counts, default=0) <= 1, "each survivor about as often"
        assert sum(counts) == (len(row) if kept.any() else 0)


def test_observed_mean_magnitude_is_that_of_remaining_weights() -> None:
    x = noise(6, 8)
    made = calibrated(x, share=0.6, quantizer=LSQ)
    assert isinstance(made.inner, LSQ)
    torch.testing.assert_close(made.inner.scale.detach(), 2 * x[made.kept].abs().mean() / 7**0.5)


@pytest.mark.parametrize(("low", "high", "reach"), [(-1.0, 1.5, 1.5), (-1.5, 1.0, 1.5), (-9.0, 9.0, 4.0)])
def test_range_of_an_observer_that_clips_stays_and_a_wider_one_shrinks(low: float, high: float, reach: float) -> None:
    """The weights that are left span -4 to 3; what the observer cuts off stays cut off."""
    x = torch.tensor([[-4.0, 3.0], [0.1, -0.2]])
    made = Pruned(spec=QuantSpec(bits=4, shape=(2, 2), signed=True), quantizer=Affine, share=0.5)
    made.calibrate_(Observed(torch.tensor(low), torch.tensor(high), torch.tensor(1.0), tensor=x))
    assert isinstance(made.inner, Affine)
    assert made.inner.scale.item() == pytest.approx(reach / 7)


def test_deep_compressions_pipeline_prune_share_huffman() -> None:
    """No centroid is spent on zeros; bytes fall from step to step, and each is what the file has."""
    x = noise(40, 50) ** 3
    plain = on(KMeans(spec=QuantSpec(bits=3, shape=(40, 50), signed=True)), x)
    options: dict[str, Any] = {"share": 0.75, "bits": 3, "quantizer": KMeans, "gap_bits": 4}
    pruned, coded = calibrated(x, **options), calibrated(x, **options, huffman=True)
    assert isinstance(pruned.inner, KMeans)
    survivors = lloyd(x[pruned.kept].reshape(1, -1), 8).float().reshape(-1)
    torch.testing.assert_close(pruned.inner.codebook.detach(), survivors, rtol=0.02, atol=0.02)
    assert pruned.inner.codebook.abs().min() > 0.5 * x[pruned.kept].abs().min()
    sizes = [2000 * 4, *(len(pack(quantizer.quantize(x))) for quantizer in (plain, pruned, coded))]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0] / 12
    assert torch.equal(pruned(x), coded(x))


@pytest.mark.parametrize("optimizer", [partial(torch.optim.SGD, momentum=0.9, weight_decay=0.1), torch.optim.Adam])
def test_pruned_weights_stay_zero_while_the_rest_learns(optimizer: Any) -> None:
    torch.manual_seed(0)
    layer = QuantLinear(source=nn.Linear(8, 6))
    layer.weight_quantizer = made = calibrated(layer.weight.detach(), quantizer=LSQ, share=0.5)
    kept, before = made.kept.clone(), layer.weight.detach().clone()
    steps = optimizer(layer.parameters(), lr=0.1)
    project_weights_(layer)
    for seed in range(5):
        steps.zero_grad()
        layer(noise(16, 8, seed=seed)).square().sum().backward()
        assert layer.weight.grad is not None
        assert not layer.weight.grad[~kept].any()
        steps.step()
        project_weights_(layer)
        assert not layer.weight[~kept].any()
    assert torch.equal(made.kept, kept)
    assert (layer.weight[kept] != before[kept]).all()
    assert not made(torch.full_like(before, 9.0))[~kept].any(), "whatever comes"


def test_rounding_leaves_pruned_weights_alone() -> None:
    torch.manual_seed(0)
    layer = QuantLinear(source=nn.Linear(30, 8))
    layer.weight_quantizer = made = calibrated(layer.weight.detach(), share=0.4, bits=3)
    nearest = made(layer.weight)
    SQuant()(nn.Sequential(layer), [], seed=0)
    assert not layer.weight[~made.kept].any()
    assert torch.equal(made(layer.weight), layer.weight)
    assert (layer.weight != nearest).any()


def test_invalid_options_are_refused() -> None:
    spec = QuantSpec(bits=4, shape=(8, 8), signed=True)
    for options, message in (
        ({"share": 1.0}, r"Pruned: share must be in \[0, 1\), got 1.0"),
        ({"share": -0.1}, "got -0.1"),
        ({"gap_bits": 0}, "Pruned: gap_bits must be 1..16, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Pruned(spec=spec, quantizer=Affine, **options)
    with pytest.raises(ValueError, match="quantizes weights only, not an input"):
        Pruned(spec=QuantSpec(bits=4), quantizer=Affine)
    with pytest.raises(ValueError, match="Product has no code for each weight"):
        calibrated(noise(16, 16), quantizer=Product, bits=4)
