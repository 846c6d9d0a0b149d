"""The distance to batch norm's statistics: its value and gradient in float64, what it counts, what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qtrain.synthesis.statistics import StatisticsMatch, moments


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def trained(norm: nn.Module, seed: int = 0) -> nn.Module:
    """``norm`` with statistics that a training could have left."""
    assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
    assert norm.running_mean is not None and norm.running_var is not None
    norm.running_mean.copy_(noise(norm.num_features, seed=seed))
    norm.running_var.copy_(noise(norm.num_features, seed=seed + 1).square() + 0.3)
    return norm.eval()


def by_hand(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """The distance of one layer in float64, channel by channel."""
    assert norm.running_mean is not None and norm.running_var is not None
    total = torch.zeros((), dtype=torch.float64)
    for c in range(norm.num_features):
        values = x[:, c].double().flatten()
        mean = values.sum() / len(values)
        std = (((values - mean) ** 2).sum() / len(values) + norm.eps).sqrt()
        wanted = (norm.running_var[c].double() + norm.eps).sqrt()
        total = total + (mean - norm.running_mean[c].double()) ** 2 + (std - wanted) ** 2
    return total


def test_statistics_distance_and_gradient_match_the_formula() -> None:
    conv, first, second = nn.Conv2d(3, 4, 3), trained(nn.BatchNorm2d(4)), trained(nn.BatchNorm2d(4), seed=5)
    assert isinstance(first, nn.BatchNorm2d) and isinstance(second, nn.BatchNorm2d)
    model = nn.Sequential(conv, first, nn.ReLU(), second)
    x = noise(5, 3, 6, 6).requires_grad_()
    with StatisticsMatch(model) as match:
        model(x)
        loss = match.loss()
    expected = by_hand(conv(x), first) + by_hand(first(conv(x)).relu(), second)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    (grad,) = torch.autograd.grad(loss, x)
    (wanted,) = torch.autograd.grad(expected, x)
    torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-6)


def test_statistics_distance_of_the_training_data_is_zero() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3, momentum=None))
    x = noise(64, 1, 8, 8)
    model(x)
    model.eval()
    with StatisticsMatch(model) as match:
        model(x)
        assert match.loss().item() < 1e-6  # the running variance is the unbiased one
        model(x + 1)
        assert match.loss().item() > 0.01


def test_statistics_distance_restarts_at_each_forward_and_counts_each_call() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = trained(nn.BatchNorm2d(2))

        def forward(self, x: Tensor) -> Tensor:
            self.norm(x)
            out: Tensor = self.norm(x)
            return out

    model, x = Twice(), noise(3, 2, 4, 4)
    assert isinstance(model.norm, nn.BatchNorm2d)
    with StatisticsMatch(model) as match:
        for _ in range(2):
            model(x)
            assert match.loss().item() == pytest.approx(2 * by_hand(x, model.norm).item(), rel=1e-5)


def test_a_constant_channel_has_a_finite_gradient() -> None:
    model = nn.Sequential(trained(nn.BatchNorm2d(2)))
    x = torch.zeros(3, 2, 4, 4, requires_grad=True)
    with StatisticsMatch(model) as match:
        model(x)
        (grad,) = torch.autograd.grad(match.loss(), x)
    assert grad.isfinite().all()


def test_moments_of_rows_are_over_samples() -> None:
    rows = torch.tensor([[1.0, 4.0], [3.0, 4.0]])
    mean, std = moments(rows, eps=0.0)
    assert mean.tolist() == [2.0, 4.0]
    assert std.tolist() == [1.0, 0.0]


def test_close_removes_all_hooks() -> None:
    model = nn.Sequential(trained(nn.BatchNorm2d(2)))
    with StatisticsMatch(model) as match:
        model(noise(2, 2, 3, 3))
    assert all(not module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ValueError, match="run the model on images"):
        match.loss()


def test_models_with_unusable_statistics_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Sequential has no batch norm layer.*patch_similarity"):
        StatisticsMatch(nn.Sequential(nn.Conv2d(1, 2, 3)))
    with pytest.raises(ValueError, match="1 of Sequential are 0 and 1, as before any training"):
        StatisticsMatch(nn.Sequential(trained(nn.BatchNorm2d(2)), nn.BatchNorm2d(2)))
    with pytest.raises(ValueError, match="0 of Sequential keeps no running statistics"):
        StatisticsMatch(nn.Sequential(nn.BatchNorm2d(2, track_running_stats=False)))
    broken = nn.Sequential(trained(nn.BatchNorm2d(2)))
    assert isinstance(broken[0], nn.BatchNorm2d) and broken[0].running_var is not None
    broken[0].running_var[1] = float("nan")
    with pytest.raises(ValueError, match="0 of Sequential are not finite"):
        StatisticsMatch(broken)
