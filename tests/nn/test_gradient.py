"""Quantized gradients: an identity forward, the paper's formula backward, and no bias."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from qtrain.functional.random import keyed_uniform
from qtrain.nn.gradient import DoReFaGradient, GradientQuantizer, IntegerGradient
from qtrain.quantizers.hooks import StepAware, begin_step_
from qtrain.spec import Granularity, PerChannel, PerSample, PerTensor
from tests.helpers.graphs import CountingBackend

KINDS: dict[str, GradientQuantizer] = {
    "dorefa": DoReFaGradient(bits=4),
    "tensor": IntegerGradient(bits=4),
    "sample": IntegerGradient(bits=4, granularity=PerSample()),
}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def backward(quantizer: GradientQuantizer, grad: Tensor, key: int = 11) -> Tensor:
    quantizer.train().begin_step_(progress=0.0, key=key)
    x = torch.zeros_like(grad, requires_grad=True)
    (result,) = torch.autograd.grad(quantizer(x), x, grad)
    return result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_forward_is_the_identity(kind: str, dtype: torch.dtype) -> None:
    x = noise(2, 3, 4, 4).to(dtype).to(memory_format=torch.channels_last)
    for mode in (True, False):
        y = KINDS[kind].train(mode)(x)
        assert torch.equal(y, x)
        assert y.is_contiguous(memory_format=torch.channels_last)
    assert backward(KINDS[kind], x).dtype == dtype


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_dorefas_formula_element_by_element_in_float64(bits: int) -> None:
    """Equation 12 with Python's floats, for the same draws; where rounding is not at a tie."""
    grad = noise(3, 2, 5) * torch.tensor([1e-6, 1.0, 50.0]).reshape(3, 1, 1)
    result = backward(DoReFaGradient(bits=bits), grad)
    sigma = (keyed_uniform(torch.tensor(11), (3, 2, 5)).double() - 0.5).tolist()
    levels = 2**bits - 1
    for n in range(3):
        largest = max(abs(v) for row in grad[n].tolist() for v in row)
        for i in range(2):
            for j in range(5):
                inner = float(grad[n, i, j]) / (2 * largest) + 0.5 + sigma[n][i][j] / levels
                expected = 2 * largest * (math.floor(inner * levels + 0.5) / levels - 0.5)
                assert float(result[n, i, j]) == pytest.approx(expected, abs=largest * 1e-6)


@pytest.mark.parametrize("granularity", [PerTensor(), PerSample()])
def test_integer_gradients_are_a_neighboring_multiple_of_the_scale(granularity: Granularity) -> None:
    grad = noise(4, 3, 5).double()
    codes_high = 2**7 - 1
    result = backward(IntegerGradient(granularity=granularity), grad.float()).double()
    largest = grad.abs().amax() if granularity == PerTensor() else grad.abs().amax(dim=(1, 2), keepdim=True)
    steps = result / largest * codes_high
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)
    assert (steps.round().abs() <= codes_high).all()
    away = (steps - grad / largest * codes_high).abs()
    assert (away < 1 + 1e-4).all()
    assert (away > 0.5).any(), "rounding to the nearest would be biased"


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_over_draws_is_the_gradient(kind: str) -> None:
    """Each draw errs by less than a step, so that the mean of n errs by a standard deviation of step / (2 sqrt n)."""
    grad = noise(2, 3, 3, seed=3)
    draws = 4000
    mean = torch.stack([backward(KINDS[kind], grad, key=1000003 * k) for k in range(draws)]).double().mean(dim=0)
    step = 2 * grad.abs().max() / (2**4 - 1) if kind == "dorefa" else grad.abs().max() / (2**3 - 1)
    assert (mean - grad).abs().max() < 5 * step / (2 * math.sqrt(draws))


@pytest.mark.parametrize("kind", KINDS)
def test_draws_differ_from_step_to_step_and_repeat_with_the_step(kind: str) -> None:
    grad = noise(4, 50)
    assert isinstance(KINDS[kind], StepAware)
    first, second, again = (backward(KINDS[kind], grad, key=key) for key in (1, 2, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(), (3,), (0, 4), (4, 0), (2, 3)])
def test_zero_and_empty_gradients_are_handled(kind: str, shape: tuple[int, ...]) -> None:
    if kind == "sample" and not shape:
        pytest.skip("a number has no samples")
    result = backward(KINDS[kind], torch.zeros(shape))
    assert result.shape == shape
    assert (result == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_eval_mode_leaves_gradients_exact(kind: str) -> None:
    x, grad = noise(2, 3).requires_grad_(), noise(2, 3, seed=1)
    assert torch.equal(torch.autograd.grad(KINDS[kind].eval()(x), x, grad)[0], grad)


@pytest.mark.parametrize("kind", KINDS)
def test_one_graph_for_all_steps_and_bits(kind: str) -> None:
    backend = CountingBackend()
    model = nn.Sequential(nn.Linear(4, 5), KINDS[kind], nn.Linear(5, 2)).train()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x = noise(6, 4)
    try:
        for step, bits in enumerate((4, 8, 3)):
            KINDS[kind].bits.fill_(bits)
            begin_step_(model, seed=0, step=step, progress=step / 3)
            ours = torch.autograd.grad(compiled(x).square().sum(), list(model.parameters()))
            plain = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
            for a, b in zip(ours, plain, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert backend.graphs == 1
    finally:
        KINDS[kind].bits.fill_(4)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"DoReFaGradient: bits must be in 2\.\.16, got 1; gradient=none"):
        DoReFaGradient(bits=1)
    with pytest.raises(ValueError, match="IntegerGradient: granularity must be tensor or sample, got PerChannel"):
        IntegerGradient(granularity=PerChannel(0))
