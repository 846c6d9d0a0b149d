"""Dynamic quantization: each group as if it were alone and calibrated statically on itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qtrain.observers.min_max import MinMax
from qtrain.quantizers.uniform.affine import Affine
from qtrain.quantizers.uniform.dynamic import Dynamic
from qtrain.spec import Granularity, Observed, PerChannel, PerGroup, PerSample, PerTensor, PerToken, QuantSpec
from qtrain.storage.base import pack, unpack
from tests.helpers.graphs import CountingBackend

SHARING: list[Granularity] = [PerTensor(), PerSample(), PerToken()]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dynamic(granularity: Granularity, *, symmetric: bool = True, signed: bool = True, axis: int = 1) -> Dynamic:
    return Dynamic(
        spec=QuantSpec(bits=4, signed=signed, channel_axis=axis), granularity=granularity, symmetric=symmetric
    )


def static(x: Tensor, symmetric: bool) -> Tensor:
    """``x`` quantized as one group by the static quantizer, calibrated on ``x`` itself."""
    quantizer = Affine(spec=QuantSpec(bits=4, signed=True), symmetric=symmetric)
    observer = MinMax(granularity=PerTensor())
    observer.update(x)
    quantizer.calibrate_(observer.observed(4))
    return quantizer(x)


@pytest.mark.parametrize("symmetric", [True, False])
def test_every_group_is_quantized_by_its_own_extremes(symmetric: bool) -> None:
    maps = noise(3, 4, 2, 5) * torch.tensor([1e-3, 1.0, 50.0]).reshape(3, 1, 1, 1)
    tokens = noise(3, 6, 4) * noise(3, 6, 1, seed=1).exp() + 0.5
    assert torch.equal(dynamic(PerTensor(), symmetric=symmetric)(maps), static(maps, symmetric))
    samples = torch.stack([static(sample, symmetric) for sample in maps])
    assert torch.equal(dynamic(PerSample(), symmetric=symmetric)(maps), samples)
    each = torch.stack([torch.stack([static(token, symmetric) for token in sample]) for sample in tokens])
    assert torch.equal(dynamic(PerToken(), symmetric=symmetric, axis=-1)(tokens), each)


def test_channel_axis_comes_from_the_spec() -> None:
    """Positions of a map: moved to the end, its channels are a token's."""
    maps = noise(2, 8, 3, 3)
    expected = dynamic(PerToken(), axis=-1)(maps.movedim(1, -1)).movedim(-1, 1)
    assert torch.equal(dynamic(PerToken(axis=-1), axis=1)(maps), expected)


def test_samples_agree_with_torchs_operator() -> None:
    """Largest magnitudes 7 s, s a power of two: there division and torch's product with the reciprocal agree."""
    x = noise(3, 40).clamp(-1, 1)
    x[:, 0] = 1.0
    x *= torch.tensor([[7 * 0.125], [7.0], [7 * 4.0]])
    scale = torch.tensor([0.125, 1.0, 4.0])
    theirs = torch.fake_quantize_per_channel_affine(x, scale, torch.zeros(3, dtype=torch.int32), 0, -8, 7)
    assert torch.equal(dynamic(PerSample())(x), theirs)


@pytest.mark.parametrize("sharing", SHARING, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", [(4, 3), (2, 4, 3, 3), (0, 3), (3, 0, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_laws_hold_for_every_sharing(
    sharing: Granularity, symmetric: bool, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    quantizer = dynamic(sharing, symmetric=symmetric).eval()
    for x in (noise(*shape).to(dtype), torch.zeros(shape, dtype=dtype), torch.full(shape, -0.3, dtype=dtype)):
        leaf = x.clone().requires_grad_()
        y = quantizer(leaf)
        stored = quantizer.quantize(x)
        assert torch.equal(y, stored.dequantize())
        assert (y.shape, y.dtype) == (x.shape, dtype)
        assert unpack(pack(stored), like=stored).nbits == stored.nbits
        assert torch.isfinite(torch.autograd.grad(y.float().sum(), leaf)[0]).all()
    assert torch.equal(quantizer(torch.zeros(shape)), torch.zeros(shape))


def test_zero_sample_does_not_affect_other_samples() -> None:
    x = noise(3, 5)
    x[1] = 0.0
    y = dynamic(PerSample())(x)
    assert torch.equal(y[1], x[1])
    assert torch.equal(y[[0, 2]], dynamic(PerSample())(x[[0, 2]]))


def test_nothing_is_stored_and_the_batch_at_hand_decides() -> None:
    quantizer = dynamic(PerTensor())
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    small = quantizer(noise(4, 3))
    quantizer(noise(4, 3) * 1000)
    assert torch.equal(quantizer(noise(4, 3)), small)
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())
    assert quantizer.storage_bits() == 0
    assert not list(quantizer.parameters())


@pytest.mark.parametrize("sharing", SHARING, ids=str)
def test_the_gradient_passes_at_the_extremes_too_and_scales_are_constants(sharing: Granularity) -> None:
    x, upstream = noise(4, 3, 5).requires_grad_(), noise(4, 3, 5, seed=1)
    for symmetric in (True, False):
        (grad,) = torch.autograd.grad(dynamic(sharing, symmetric=symmetric)(x), x, upstream)
        assert torch.equal(grad, upstream)
    (grad,) = torch.autograd.grad(dynamic(sharing, signed=False)(x), x, upstream)
    assert torch.equal(grad, upstream * (x >= 0))


def test_calibration_chooses_the_sign_of_symmetric_codes_alone() -> None:
    for low, symmetric, expected in ((0.0, True, (0, 15)), (-1.0, True, (-8, 7)), (-1.0, False, (0, 15))):
        quantizer = Dynamic(spec=QuantSpec(bits=4), granularity=PerSample(), symmetric=symmetric)
        quantizer.calibrate_(Observed(torch.tensor(low), torch.tensor(1.0), torch.tensor(0.5)))
        assert (int(quantizer.code_low), int(quantizer.code_high)) == expected


@pytest.mark.parametrize("sharing", SHARING, ids=str)
def test_one_graph_for_every_sharing_and_all_bits(sharing: Granularity) -> None:
    backend = CountingBackend()
    quantizer = dynamic(sharing)
    compiled = torch.compile(quantizer, backend=backend, fullgraph=True)
    for bits in (4, 8):
        quantizer.set_range_(bits=bits, signed=True)
        x = noise(2, 4, 3, 3, seed=bits)
        torch.testing.assert_close(compiled(x), quantizer(x), rtol=1e-6, atol=1e-7)
    assert backend.graphs == 1


@pytest.mark.parametrize("wrong", [PerChannel(0), PerGroup(2)])
def test_granularities_of_weights_are_refused(wrong: Granularity) -> None:
    with pytest.raises(ValueError, match="Dynamic: granularity must be tensor, sample or token, got Per"):
        dynamic(wrong)
    with pytest.raises(ValueError, match="Dynamic: quantizes inputs only"):
        Dynamic(spec=QuantSpec(bits=4, shape=(4, 4), signed=True), granularity=wrong)
