"""VS-Quant: a weight by hand, the paper's equations in Python's floats, sizes, gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qtrain.quantizers.block.vsq import VSQ
from qtrain.spec import Observed, QuantSpec
from qtrain.storage.vector_scaled import VectorScaledTensor


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def for_weight(*shape: int, bits: int = 4, **options: int) -> VSQ:
    return VSQ(spec=QuantSpec(bits=bits, shape=shape, signed=True), **options)


def for_input(bits: int = 4, low: float = 0.0, axis: int = 1, **options: int) -> VSQ:
    quantizer = VSQ(spec=QuantSpec(bits=bits, channel_axis=axis), **options)
    quantizer.calibrate_(Observed(torch.tensor(low), torch.tensor(1.0), torch.tensor(0.5)))
    return quantizer


def test_a_weight_by_hand() -> None:
    """3 bits, Qp = 3; vectors of two with s = 3, 1, 0.2; in two bits gamma = 1, so that 0.2 / gamma is rounded to 0."""
    stored = for_weight(1, 6, bits=3, size=2, scale_bits=2).quantize(torch.tensor([[9.0, -4.0, 3.0, 1.4, 0.6, 0.2]]))
    assert isinstance(stored, VectorScaledTensor)
    assert stored.coarse.tolist() == [[1.0]]
    assert stored.fine.tolist() == [[3, 1, 0]]
    assert stored.codes.tolist() == [[3, -1, 3, 1, 3, 1]]
    assert stored.dequantize().tolist() == [[9.0, -3.0, 3.0, 1.0, 0.0, 0.0]]
    assert stored.nbits == 6 * 3 + 3 * 2 + 32


def by_equations(vectors: list[list[float]], high: int, low: int, scale_bits: int) -> list[list[float]]:
    """Vectors that share a coarse scale: equations of §4.2, one after the other."""
    top = 2**scale_bits - 1
    scales = [max(abs(x) if low else max(x, 0.0) for x in vector) / high for vector in vectors]
    coarse = max(scales) / top
    return [
        [min(max(round(x / s), low), high) * round(s / coarse) * coarse if s else 0.0 for x in vector]
        for vector, s in zip(vectors, scales, strict=True)
    ]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("size", "scale_bits"), [(16, 4), (5, 6), (64, 1)])
def test_a_weight_against_the_papers_equations(bits: int, size: int, scale_bits: int) -> None:
    w = noise(3, 37, 2) * torch.exp(noise(3, 37, 2, seed=1))
    result = for_weight(3, 37, 2, bits=bits, size=size, scale_bits=scale_bits)(w)
    high = 2 ** (bits - 1) - 1
    for channel in range(3):
        columns = [w[channel, begin : begin + size, k].tolist() for k in (0, 1) for begin in range(0, 37, size)]
        flat = [value for vector in by_equations(columns, high, -high, scale_bits) for value in vector]
        expected = torch.tensor(flat).reshape(2, 37).T
        torch.testing.assert_close(result[channel], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("low", [0.0, -1.0])
def test_an_input_has_one_coarse_scale_and_the_sign_that_was_seen(low: float, axis: int) -> None:
    x = noise(2, 20, 3) if axis == 1 else noise(2, 3, 20)
    moved = x.movedim(axis, -1).reshape(-1, 20)
    vectors = [row[begin : begin + 16] for row in moved.tolist() for begin in (0, 16)]
    flat = by_equations(vectors, 7 if low else 15, -7 if low else 0, 4)
    expected = torch.tensor([value for vector in flat for value in vector])
    result = for_input(low=low, axis=axis)(x).movedim(axis, -1)
    torch.testing.assert_close(result.reshape(-1), expected, rtol=1e-5, atol=1e-6)


def test_effective_bits_match_the_paper() -> None:
    """4 + 4 / 16 = 4.25 bits, and a float for each output channel."""
    quantizer = for_weight(8, 64, 3, 3)
    stored = quantizer.quantize(noise(8, 64, 3, 3))
    assert stored.nbits == 4.25 * stored.codes.numel() + 8 * 32
    assert quantizer.storage_bits() == stored.nbits - 4 * stored.codes.numel()
    assert for_input().storage_bits() == 0


def test_many_scale_bits_leave_only_rounding_error() -> None:
    w = noise(4, 64)
    fine = for_weight(4, 64, bits=8, scale_bits=16)(w)
    off = (fine - w).abs().reshape(4, 4, 16)
    assert (off <= w.abs().reshape(4, 4, 16).amax(2, keepdim=True) / 127 * 0.51).all()


def test_gradient_passes_except_to_negative_unsigned_inputs() -> None:
    x, upstream = noise(2, 20), noise(2, 20, seed=1)
    for quantizer, passed in (
        (for_input(low=-1.0), torch.ones_like(x)),
        (for_weight(2, 20), torch.ones_like(x)),
        (for_input(low=0.0), (x >= 0).float()),
    ):
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(quantizer(leaf), leaf, upstream)
        assert torch.equal(grad, upstream * passed)


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ValueError, match=r"VSQ: scale_bits must be in 1\.\.16, got 0"):
        for_input(scale_bits=0)
    with pytest.raises(ValueError, match="VSQ: size must be at least 1 element of a vector, got 0"):
        for_input(size=0)
    with pytest.raises(ValueError, match=r"VSQ: bits must be 2\.\.8, got 1"):
        for_weight(2, 2, bits=1)
