"""Weights rounded as merged with the norm behind: the formula of the paper, its gradient, and what stays apart."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from qtrain.functional.ste import round_ste
from qtrain.nn import QuantConv
from qtrain.nn.folded import LEAST, FoldedWeight, fixed_factors, holding_factors
from qtrain.quantizers.uniform.affine import Affine
from qtrain.spec import Observed, PerChannel, QuantSpec


def pair(bits: int = 3, gamma: float | None = None) -> tuple[QuantConv, nn.BatchNorm2d]:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4)
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.2, 3)
        norm.weight.uniform_(-1.5, 1.5)
        norm.bias.normal_()
        if gamma is not None:
            norm.weight[1] = gamma
    conv = QuantConv(source=nn.Conv2d(2, 4, 3, bias=False))
    conv.weight_transform = FoldedWeight(norm=norm)
    quantizer = Affine(spec=QuantSpec(bits=bits, shape=(4, 2, 3, 3), signed=True), granularity=PerChannel())
    largest = conv.effective_weight().detach().abs().amax(dim=(1, 2, 3)).reshape(quantizer.state_shape)
    quantizer.calibrate_(Observed(-largest, largest, largest))
    conv.weight_quantizer = quantizer
    return conv, norm


def paper(conv: QuantConv, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """``conv(x, Q(gamma / sigma_r W)) sigma_r / sigma_B + beta - gamma mu_B / sigma_B`` (1806.08342, §3.2.2)."""
    running = (norm.running_var + norm.eps).sqrt()
    scale = conv.weight_quantizer.scale  # type: ignore[union-attr, operator]
    merged = conv.weight * (norm.weight / running).reshape(-1, 1, 1, 1)
    rounded = round_ste((merged / scale).clamp(-4, 3)) * scale
    y = nn.functional.conv2d(x, rounded)
    seen = y / (norm.weight / running).detach().reshape(1, -1, 1, 1)
    mean, sigma = seen.mean(dim=(0, 2, 3)), (seen.var(dim=(0, 2, 3), correction=0) + norm.eps).sqrt()
    shift = norm.bias - norm.weight * mean / sigma
    return y * (running / sigma).reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)


def test_in_training_it_is_the_papers_correction() -> None:
    conv, norm = pair()
    x = torch.randn(16, 2, 8, 8)
    expected = paper(conv, copy.deepcopy(norm), x)
    torch.testing.assert_close(norm.train()(conv(x)), expected, atol=1e-4, rtol=1e-4)


def test_in_eval_it_is_the_merged_layer() -> None:
    conv, norm = pair()
    x = torch.randn(4, 2, 8, 8)
    factor = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach()
    merged = conv.weight_quantizer(conv.weight.detach() * factor.reshape(-1, 1, 1, 1))  # type: ignore[misc]
    expected = nn.functional.conv2d(x, merged, norm.bias - norm.running_mean * factor)
    torch.testing.assert_close(norm.eval()(conv(x)), expected, atol=1e-5, rtol=1e-5)


def test_without_quantizer_it_is_the_convolution() -> None:
    conv, _ = pair()
    x, quantizer = torch.randn(4, 2, 8, 8), conv.weight_quantizer
    assert quantizer is not None
    quantizer.enabled = False
    torch.testing.assert_close(conv(x), nn.functional.conv2d(x, conv.weight), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 1e-9, -1e-9])
def test_a_channel_that_is_switched_off_stays_finite(gamma: float) -> None:
    conv, norm = pair(gamma=gamma)
    out = norm.train()(conv(torch.randn(4, 2, 8, 8)))
    out.square().sum().backward()
    assert out.isfinite().all() and conv.weight.grad is not None and conv.weight.grad.isfinite().all()
    assert float((out[:, 1] - norm.bias[1]).detach().abs().max()) < 1e-6
    assert LEAST < 1e-3


def test_gradients_reach_weight_and_norm() -> None:
    conv, norm = pair(bits=8)
    norm.train()(conv(torch.randn(8, 2, 8, 8))).pow(3).sum().backward()
    for parameter in (conv.weight, norm.weight, norm.bias):
        assert parameter.grad is not None and float(parameter.grad.abs().sum()) > 0


def test_norm_state_appears_once_in_the_state_dict() -> None:
    conv, norm = pair()
    model = nn.Sequential(conv, norm)
    assert not any("norm" in key for key in model.state_dict())
    assert len(list(model.parameters())) == 3
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[1].weight.mul_(2)
    assert not torch.equal(twin[0].effective_weight(), model[0].effective_weight())  # the copy looks at its own norm


def test_the_step_compiles_without_a_break() -> None:
    conv, norm = pair()
    model = nn.Sequential(conv, norm, nn.ReLU()).train()
    x = torch.randn(4, 2, 8, 8)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True, backend="eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(x), model(x))


def test_a_held_factor_does_not_follow_statistics_that_are_reset() -> None:
    conv, norm = pair()
    model, x = nn.Sequential(conv, norm), torch.randn(4, 2, 8, 8)
    before = conv(x)
    with holding_factors(model):
        norm.reset_running_stats()
        torch.testing.assert_close(conv(x), before)
    assert float((conv(x) - before).detach().abs().max()) > 0.1


def test_a_norm_without_running_statistics_is_refused() -> None:
    with pytest.raises(ValueError, match="keeps no running statistics"):
        FoldedWeight(norm=nn.BatchNorm2d(3, track_running_stats=False))


def test_epsilon_is_part_of_the_factor() -> None:
    """``g = gamma / sqrt(var + eps)``: 2 / sqrt(0 + 0.25) = 4, and 2 / sqrt(0.75 + 0.25) = 2."""
    norm = nn.BatchNorm2d(2, eps=0.25)
    with torch.no_grad():
        norm.running_var.copy_(torch.tensor([0.0, 0.75]))
        norm.weight.fill_(2.0)
    transform, weight = FoldedWeight(norm=norm), torch.ones(2, 1, 1, 1)
    torch.testing.assert_close(transform(weight).flatten(), torch.tensor([4.0, 2.0]))
    torch.testing.assert_close(transform.restore(weight).flatten(), torch.tensor([0.25, 0.5]))


def test_channels_near_zero_get_the_mean_factor_of_the_others() -> None:
    """By hand, with an eps that counts: 2 / sqrt(0.3 + 0.1) and 1.5 / sqrt(0.8 + 0.1) are the others'."""
    norm = nn.BatchNorm2d(4, eps=0.1)
    with torch.no_grad():
        norm.running_var.copy_(torch.tensor([0.0, 0.3, 0.8, 0.15]))
        norm.weight.copy_(torch.tensor([1e-3, 2.0, -1.5, 0.0]))
        mean = (2 / 0.4**0.5 + 1.5 / 0.9**0.5) / 2
        torch.testing.assert_close(fixed_factors(norm), torch.tensor([mean, 0.0, 0.0, mean]))
        norm.weight.clamp_(max=1e-3, min=-1e-3)
        assert fixed_factors(norm).tolist() == [1.0] * 4  # type: ignore[union-attr]
        norm.weight.fill_(0.01)
        assert fixed_factors(norm) is None
