"""QIL: the transformer of its paper element by element, and difference quotients for all that it learns."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qtrain.quantizers.uniform.qil import QIL
from qtrain.spec import Observed, QuantSpec


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def qil(center: float, width: float, gamma: float = 1.0, *, bits: int = 4, weight: bool = True) -> QIL:
    quantizer = QIL(spec=QuantSpec(bits=bits, shape=(9,) if weight else (), signed=weight))
    with torch.no_grad():
        quantizer.center.fill_(center)
        quantizer.width.fill_(width)
        if quantizer.gamma is not None:
            quantizer.gamma.fill_(gamma)
    return quantizer


def transformed(x: float, center: float, width: float, gamma: float) -> float:
    """Equation 3, as the paper writes it: alpha = 0.5 / d, beta = -0.5 c / d + 0.5."""
    alpha, beta = 0.5 / width, -0.5 * center / width + 0.5
    if abs(x) < center - width:
        return 0.0
    return math.copysign(1.0 if abs(x) > center + width else (alpha * abs(x) + beta) ** gamma, x)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_weights_are_transformed_and_rounded(bits: int, gamma: float) -> None:
    """Equations 2 and 3; where rounding is not at a tie."""
    x = noise(500) * 0.6
    levels = 2 ** (bits - 1) - 1
    inner = [transformed(v, 0.5, 0.35, gamma) * levels for v in x.tolist()]
    expected = [math.copysign(math.floor(abs(t) + 0.5), t) / levels for t in inner]
    torch.testing.assert_close(qil(0.5, 0.35, gamma, bits=bits)(x), torch.tensor(expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_inputs_are_transformed_and_rounded(bits: int) -> None:
    """Equations 2 and 5: zero below the interval, one above, for unsigned values."""
    x = noise(500)
    levels = 2**bits - 1
    expected = [math.floor(max(transformed(v, 0.8, 0.6, 1.0), 0.0) * levels + 0.5) / levels for v in x.tolist()]
    result = qil(0.8, 0.6, bits=bits, weight=False)(x)
    torch.testing.assert_close(result, torch.tensor(expected), rtol=1e-6, atol=1e-6)
    assert result[x < 0.2].abs().max() == 0
    assert result[x > 1.4].min() == 1


@pytest.mark.parametrize("weight", [True, False])
def test_gradients_are_the_difference_quotients_of_the_transformer(weight: bool) -> None:
    """Rounding is straight-through, all else exact: center, width, gamma and x, in float64, away from the kinks."""
    center, width, gamma = 0.5, 0.3, 1.4 if weight else 1.0
    x = noise(300, seed=2) * 0.6
    kinks = torch.tensor([0.0, center - width, center + width])
    x = x[((x.abs()[:, None] - kinks).abs() > 1e-3).all(dim=1)]
    upstream = noise(len(x), seed=3)
    h = 1e-5

    def total(x: Tensor, center: float, width: float, gamma: float) -> float:
        values = [transformed(v, center, width, gamma) for v in x.tolist()]
        return sum(g * (t if weight else max(t, 0.0)) for g, t in zip(upstream.tolist(), values, strict=True))

    def quotient(*shift: float) -> float:
        plus, minus = ([a + sign * b for a, b in zip((center, width, gamma), shift, strict=True)] for sign in (1, -1))
        return (total(x, *plus) - total(x, *minus)) / (2 * h)

    quantizer = qil(center, width, gamma, weight=weight)
    leaf = x.clone().requires_grad_()
    learned = [p for p in (quantizer.center, quantizer.width, quantizer.gamma) if p is not None]
    assert len(learned) == (3 if weight else 2)
    for_x, *grads = torch.autograd.grad(quantizer(leaf), [leaf, *learned], upstream)
    for grad, shift in zip(grads, ((h, 0, 0), (0, h, 0), (0, 0, h)), strict=False):
        assert grad.item() == pytest.approx(quotient(*shift), rel=1e-3)
    each = [
        (transformed(v + h, center, width, gamma) - transformed(v - h, center, width, gamma)) / (2 * h)
        for v in x.tolist()
    ]
    slopes = torch.tensor(each) if weight else torch.tensor(each) * (x > 0)
    torch.testing.assert_close(for_x, slopes * upstream, rtol=1e-3, atol=1e-5)
    assert (for_x == 0).any(), "pruned and clipped values have no gradient"


@pytest.mark.parametrize(("low", "high", "codes"), [(-3.0, 2.0, (-7, 7)), (0.0, 3.0, (0, 15))])
def test_it_starts_as_uniform_quantization_of_the_observed_range(
    low: float, high: float, codes: tuple[int, int]
) -> None:
    """Divided by the reach, since QIL's values lie in [-1, 1]; torch's own operator is the reference."""
    quantizer = QIL(spec=QuantSpec(bits=4))
    quantizer.calibrate_(Observed(torch.tensor(low), torch.tensor(high), torch.tensor(1.0)))
    x = noise(1000) * 2
    uniform = torch.fake_quantize_per_tensor_affine(x, 3.0 / codes[1], 0, *codes) / 3.0
    torch.testing.assert_close(quantizer(x), uniform, rtol=1e-5, atol=1e-6)


def test_zero_stays_zero_for_every_interval() -> None:
    """A center below the width would raise the transformed zero: the pruning threshold stops at zero instead."""
    for weight in (True, False):
        quantizer = qil(0.1, 0.9, weight=weight)
        center, width = quantizer.interval()
        assert center == width
        assert quantizer(torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]
    negative = qil(-1.0, -0.5)
    assert negative.interval() == (0.5, 0.5)
    assert torch.isfinite(negative(noise(9))).all()


def test_gamma_exists_only_for_weights_and_is_optional() -> None:
    assert QIL(spec=QuantSpec(bits=4)).gamma is None
    assert QIL(spec=QuantSpec(bits=4, shape=(2,), signed=True), learn_gamma=False).gamma is None


def test_gamma_below_one_keeps_gradients_finite_for_pruned_weights() -> None:
    """t^gamma has no finite derivative at zero, where most pruned weights are."""
    quantizer = qil(0.5, 0.3, 0.5)
    x = torch.tensor([0.0, 0.1, 0.2, 0.5, 0.9], requires_grad=True)
    for grad in torch.autograd.grad(quantizer(x).sum(), [x, *quantizer.parameters()]):
        assert torch.isfinite(grad).all()
