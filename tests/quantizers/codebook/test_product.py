"""Product quantization: nearest vectors by search, clusters that only get better, gradients averaged by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from sklearn.cluster import KMeans as Reference
from torch import Tensor

from qtrain.observers.min_max import MinMax
from qtrain.quantizers.codebook.product import Product, cluster, lloyd_step, members, nearest_vector
from qtrain.quantizers.hooks import begin_step_, project
from qtrain.spec import Observed, PerTensor, QuantSpec
from qtrain.storage.product import ProductTensor

SHAPE = (8, 4, 3, 3)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def made(weight: Tensor, bits: int = 3, **options: object) -> Product:
    spec = QuantSpec(bits=bits, shape=tuple(weight.shape), signed=True)
    quantizer = Product(spec=spec, **options)  # type: ignore[arg-type]
    observer = MinMax(granularity=PerTensor())
    observer.update(weight)
    quantizer.calibrate_(observer.observed(bits)._replace(tensor=weight))
    return quantizer


def squared_error(vectors: Tensor, codebook: Tensor) -> float:
    return float(torch.cdist(vectors.double(), codebook.double()).amin(1).square().sum())


def test_blocks_are_runs_of_an_output_channel() -> None:
    """Two kernels of four, by hand: a codebook of two vectors, indices 0, 1, 1, 0."""
    stored = ProductTensor(
        codes=torch.tensor([[0, 1], [1, 0]]), bits=1, low=0, high=1, shape=(2, 2, 2, 1),
        codebook=torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
    )  # fmt: skip
    assert stored.dequantize().tolist() == [[[[1], [2]], [[3], [4]]], [[[3], [4]], [[1], [2]]]]
    assert stored.nbits == 4 * 1 + 4 * 32
    assert stored.operand_bits == 32


@pytest.mark.parametrize(
    ("shape", "block"), [((8, 4, 3, 3), 9), ((8, 4, 1, 1), 4), ((10, 64), 4), ((4, 6), 3), ((4, 1, 5), 5), ((7,), 1)]
)
def test_default_blocks_match_the_paper(shape: tuple[int, ...], block: int) -> None:
    assert Product(spec=QuantSpec(bits=3, shape=shape, signed=True)).block == block


def test_every_block_takes_its_nearest_vector() -> None:
    weight = noise(*SHAPE)
    quantizer = made(weight)
    codebook = quantizer.codebook.detach().double()
    for o in range(8):
        for i in range(4):
            block = weight[o, i].reshape(9).double()
            nearest = codebook[(codebook - block).square().sum(1).argmin()]
            torch.testing.assert_close(quantizer(weight)[o, i].detach().reshape(9).double(), nearest)


@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e25])
def test_nearest_vector_is_independent_of_the_unit(scale: float) -> None:
    vectors, codebook = noise(50, 3) * scale, noise(8, 3, seed=1) * scale
    expected = torch.cdist(vectors.double(), codebook.double()).argmin(1)
    assert torch.equal(nearest_vector(vectors, codebook), expected)


def test_an_iteration_never_makes_the_error_larger() -> None:
    vectors, codebook = noise(300, 4), noise(300, 4)[:16]
    errors = [squared_error(vectors, codebook)]
    for step in range(20):
        codebook = lloyd_step(vectors, codebook, step)
        errors.append(squared_error(vectors, codebook))
    assert all(after <= before + 1e-6 for before, after in itertools.pairwise(errors))
    assert errors[-1] < 0.8 * errors[0]


def test_codebook_error_matches_scikit_learn() -> None:
    vectors = noise(400, 3)
    found = cluster(vectors, 16)
    reference = Reference(16, init="random", n_init=1, random_state=0).fit(vectors.numpy())
    assert squared_error(vectors, found) < 1.1 * reference.inertia_
    indices = nearest_vector(vectors, found)
    means = torch.stack([vectors[indices == k].mean(0) for k in range(16)])
    torch.testing.assert_close(found, means, rtol=1e-4, atol=1e-5)  # where Lloyd's iterations end


def test_empty_clusters_split_the_most_populated() -> None:
    vectors = torch.cat([noise(20, 2), noise(3, 2, seed=1) + 50])
    far = torch.full((2, 2), -1000.0)
    codebook = torch.cat([torch.zeros(1, 2), torch.full((1, 2), 50.0), far])
    moved = lloyd_step(vectors, codebook, 0)
    center = vectors[:20].mean(0)
    halves, others = moved[[0, 2]], moved[[1, 3]]
    torch.testing.assert_close(halves.mean(0), center, rtol=0, atol=1e-4)
    torch.testing.assert_close(others.mean(0), vectors[20:].mean(0), rtol=0, atol=1e-4)
    assert not torch.equal(halves[0], halves[1])
    assert (members(nearest_vector(vectors, moved), 4) > 0).sum() > 2


def test_codebook_larger_than_blocks_is_lossless() -> None:
    weight = noise(2, 3, 3, 3)
    quantizer = made(weight, bits=5)
    assert torch.equal(quantizer(weight), weight)
    assert quantizer.quantize(weight).nbits == 6 * 5 + 32 * 9 * 32


@pytest.mark.parametrize("train", ["centroids", "both"])
def test_codebook_vectors_get_the_mean_of_their_members_gradients(train: str) -> None:
    """iPQ: c <- c - eta / |J_c| sum over (k, l) in J_c of dL/db_kl."""
    weight, upstream = noise(*SHAPE).requires_grad_(), noise(*SHAPE, seed=1)
    quantizer = made(weight.detach(), train=train)
    to_weight, to_codebook = torch.autograd.grad(quantizer(weight), [weight, quantizer.codebook], upstream)
    codes = quantizer.quantize(weight.detach()).codes.reshape(-1)
    blocks = upstream.reshape(-1, 9)
    for k in range(8):
        torch.testing.assert_close(to_codebook[k], blocks[codes == k].mean(0))
    assert torch.equal(to_weight, upstream if train == "both" else torch.zeros(SHAPE))


def test_blocks_keep_their_vector_while_the_codebook_moves() -> None:
    weight = noise(*SHAPE)
    quantizer = made(weight)
    before = quantizer.quantize(weight).codes
    with torch.no_grad():
        quantizer.codebook.add_(noise(8, 9))
    assert torch.equal(quantizer.quantize(weight).codes, before)


def test_layer_before_start_is_real_and_codebook_follows_weight() -> None:
    weight = noise(*SHAPE)
    quantizer = made(weight, start=0.5).train()
    begin_step_(quantizer, seed=0, step=0, progress=0.4)
    moved = (noise(*SHAPE, seed=1) * 2).requires_grad_()
    assert torch.equal(quantizer(moved), moved)
    (grad,) = torch.autograd.grad(quantizer(moved).sum(), moved)
    assert torch.equal(grad, torch.ones(SHAPE))
    assert not torch.equal(quantizer.eval()(moved), moved), "eval mode is always quantized"
    quantizer.train()
    before = squared_error(moved.detach().reshape(-1, 9), quantizer.anchors)
    assert torch.equal(project(quantizer, moved.detach()), moved)
    after = squared_error(moved.detach().reshape(-1, 9), quantizer.anchors)
    assert after < before
    begin_step_(quantizer, seed=0, step=1, progress=0.5)
    assert torch.equal(quantizer(moved), quantizer.quantize(moved).dequantize())
    kept = quantizer.anchors.clone()
    project(quantizer, moved.detach())
    assert torch.equal(quantizer.anchors, kept)


def test_wrong_options_are_refused() -> None:
    spec = QuantSpec(bits=4, shape=SHAPE, signed=True)
    with pytest.raises(ValueError, match=r"Product: block 5 does not divide the 36 values .* use one of \[1, 2, 3, 4"):
        Product(spec=spec, block=5)
    with pytest.raises(ValueError, match="Product: block must be at least 1, or 0 for the kernel's size, got -1"):
        Product(spec=spec, block=-1)
    with pytest.raises(ValueError, match="Product: train must be 'centroids' or 'both', got 'all'"):
        Product(spec=spec, train="all")
    with pytest.raises(ValueError, match=r"Product: start must be in \[0, 1\], got 2"):
        Product(spec=spec, start=2.0)


def test_blocks_take_the_same_vectors_under_mixed_precision() -> None:
    """A student trains under autocast and is stored without."""
    weight = torch.randn(64, 32, 3, 3, generator=torch.Generator().manual_seed(0))
    quantizer = Product(spec=QuantSpec(bits=8, shape=tuple(weight.shape)))
    quantizer.calibrate_(Observed(torch.zeros(()), torch.zeros(()), torch.zeros(()), tensor=weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = quantizer.indices(weight)
    assert torch.equal(mixed, quantizer.indices(weight))
