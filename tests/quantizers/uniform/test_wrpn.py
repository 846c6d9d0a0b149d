"""WRPN: fixed-point formulas by hand and against torch's own operator."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qtrain.quantizers.uniform.wrpn import WRPN
from qtrain.spec import Observed, QuantSpec


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def for_weight(bits: int) -> WRPN:
    return WRPN(spec=QuantSpec(bits=bits, shape=(6,), signed=True))


def for_input(bits: int, low: float = 0.0) -> WRPN:
    quantizer = WRPN(spec=QuantSpec(bits=bits, signed=low < 0))
    quantizer.calibrate_(Observed(torch.tensor(low), torch.tensor(1.0), torch.tensor(0.5)))
    return quantizer


def test_three_bits_by_hand() -> None:
    """Two fractional bits and a sign: thirds from -1 to 1. Inputs have sevenths from 0 to 1."""
    weight = torch.tensor([-1.4, -0.6, -0.16, 0.17, 0.9, 2.0])
    torch.testing.assert_close(for_weight(3)(weight), torch.tensor([-1.0, -2 / 3, 0.0, 1 / 3, 1.0, 1.0]))
    assert for_weight(3).quantize(weight).codes.tolist() == [-3, -2, 0, 1, 3, 3]
    torch.testing.assert_close(for_input(3)(weight), torch.tensor([0.0, 0.0, 0.0, 1 / 7, 6 / 7, 1.0]))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_values_and_gradients_agree_with_torchs_operator(bits: int) -> None:
    x, upstream = noise(3000).requires_grad_(), noise(3000, seed=1)
    for quantizer, low, high in (
        (for_weight(bits), 1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1),
        (for_input(bits, low=-1.0), 1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1),
        (for_input(bits), 0, 2**bits - 1),
    ):
        ours, theirs = quantizer(x), torch.fake_quantize_per_tensor_affine(x, 1 / high, 0, low, high)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
        (grad,) = torch.autograd.grad(ours, x, upstream)
        inside = (x >= (0 if low == 0 else -1)) & (x <= 1)
        torch.testing.assert_close(grad, upstream * inside, rtol=1e-6, atol=0)


def test_a_weight_has_a_bit_for_its_sign() -> None:
    with pytest.raises(ValueError, match=r"WRPN: 1 bit\(s\) signed leave no positive code; use at least 2 bits"):
        for_weight(1)
    assert for_input(1)(torch.tensor([0.4, 0.6])).tolist() == [0.0, 1.0]
