"""Bias correction takes back the shift that rounding makes, from statistics and from images."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qtrain.convert.calibrate import calibrate
from qtrain.convert.fold import OutputStatistics, fold_batchnorm_
from qtrain.convert.layers import find_layers, quant_layers, set_quantization
from qtrain.convert.plan import LayerPlan, plan_layers
from qtrain.convert.swap import swap_layers
from qtrain.models.factory import create_model
from qtrain.observers.min_max import MinMax
from qtrain.ptq.bias_correction import BiasCorrection, FromBatches, FromStatistics
from qtrain.ptq.rounding.adaround import AdaRound
from qtrain.ptq.rounding.base import Rounding
from qtrain.ptq.rounding.squant import SQuant
from qtrain.quantizers.uniform.affine import Affine
from qtrain.spec import FULL_PRECISION, LayerBits

RECIPE = LayerPlan(weight=Affine, input=Affine, weight_observer=MinMax, input_observer=MinMax)


def student(model: nn.Module, images: Tensor, weight: int = 3, input: int = FULL_PRECISION) -> nn.Module:
    found = find_layers(model, images[:1])
    plans = plan_layers(found, dict.fromkeys(found.weighted, LayerBits(weight, input)), RECIPE)
    swap_layers(model, found, plans)
    calibrate(model, [images], plans)
    return model.eval()


def outputs(model: nn.Module, images: Tensor, name: str) -> Tensor:
    """Mean of each output channel of layer ``name``."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda _, __, output: seen.append(output.detach()))
    with torch.no_grad():
        model(images)
    handle.remove()
    return seen[0].transpose(0, 1).flatten(1).mean(dim=1)


def planted() -> tuple[nn.Module, Tensor, dict[str, OutputStatistics]]:
    """A layer whose inputs are clipped normals of known moments, and one behind, all of whose weights are rounded up.

    The weights lie just above the middle between two of 4 levels, so that each is rounded by nearly half a step in the
    same direction, the worst that rounding can do to a mean.
    """
    torch.manual_seed(0)
    first, second = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 4, 1)
    mean, std = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -0.5]), torch.tensor([1.0, 0.5, 1.0, 2.0, 0.1, 3.0])
    with torch.no_grad():
        first.weight.copy_(torch.diag(std).reshape(6, 6, 1, 1))
        first.bias.copy_(mean)
        second.weight.fill_(0.52)
        second.weight[:, 0] = 3.0  # with MinMax the step is 1
    images = torch.randn(512, 6, 8, 8)
    return nn.Sequential(first, nn.ReLU(), second), images, {"0": OutputStatistics(mean, std)}


@pytest.mark.parametrize("correction", [FromStatistics(), FromBatches()], ids=["statistics", "batches"])
def test_bias_correction_removes_a_planted_shift(correction: BiasCorrection) -> None:
    model, images, statistics = planted()
    model = student(model, images)
    model[0].weight_quantizer.enabled = False
    model[2].weight_quantizer.enabled = False
    wanted = outputs(model, images, "2")
    model[2].weight_quantizer.enabled = True
    shift = (outputs(model, images, "2") - wanted).abs().max()
    assert float(shift) > 1
    model[0].weight_quantizer = None  # the statistics are of this layer as it is
    correction(model, [images], statistics)
    assert float((outputs(model, images, "2") - wanted).abs().max()) < 0.01 * float(shift)


def test_correction_is_the_weight_error_times_the_clipped_mean() -> None:
    model, images, statistics = planted()
    model = student(model, images)
    before = model[2].bias.detach().clone()
    error = (model[2].weight_quantizer(model[2].weight) - model[2].weight).detach()[:, :, 0, 0]
    draws = statistics["0"].mean + statistics["0"].std * torch.randn(400_000, 6)
    FromStatistics()(model, [], statistics)
    torch.testing.assert_close(before - model[2].bias.detach(), error @ draws.relu().mean(dim=0), atol=0.02, rtol=0)


def test_grouped_and_flattened_inputs() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(24, 3)]
    model, images = nn.Sequential(*layers), torch.randn(32, 4, 4, 4)
    mean, std = torch.tensor([0.3, -1.0, 2.0, 0.0]), torch.tensor([0.5, 1.0, 1.0, 2.0])
    model = student(model, images, weight=2)
    grouped = model[2]
    before, error = grouped.bias.detach().clone(), grouped.weight_quantizer(grouped.weight) - grouped.weight
    FromStatistics()(
        model, [], {"0": OutputStatistics(mean, std), "2": OutputStatistics(torch.zeros(6), torch.ones(6))}
    )
    clipped = (mean + std * torch.randn(400_000, 4)).relu().mean(dim=0)
    sums = error.detach().sum(dim=(2, 3))
    expected = torch.cat((sums[:3] @ clipped[:2], sums[3:] @ clipped[2:]))
    torch.testing.assert_close(before - grouped.bias.detach(), expected, atol=0.02, rtol=0)


def test_correction_from_batches_restores_the_full_precision_mean_of_every_layer(settle: Any) -> None:
    torch.manual_seed(0)
    model = settle(create_model(name="cifar_resnet8", num_classes=10, in_channels=3, image_size=16))
    images = torch.randn(32, 3, 16, 16)
    fold_batchnorm_(model, images[:1])
    model = student(model, images, weight=3, input=3)
    names = list(quant_layers(model))
    set_quantization(model, enabled=False)
    wanted = {name: outputs(model, images, name) for name in names}
    set_quantization(model, enabled=True)
    before = {name: outputs(model, images, name) for name in names}
    FromBatches()(model, list(images.split(8)), {})
    for name in names:
        torch.testing.assert_close(outputs(model, images, name), wanted[name], atol=1e-4, rtol=1e-3)
        assert float((before[name] - wanted[name]).abs().max()) > 1e-2, name
    assert all(q.enabled for layer in quant_layers(model).values() if (q := layer.input_quantizer) is not None)


def test_correction_from_statistics_brings_every_layer_closer(settle: Any) -> None:
    torch.manual_seed(0)
    model = settle(create_model(name="cifar_resnet8", num_classes=10, in_channels=3, image_size=16))
    images = torch.randn(64, 3, 16, 16)
    statistics = fold_batchnorm_(model, images[:1])
    model = student(model, images, weight=3)
    corrected = copy.deepcopy(model)
    FromStatistics()(corrected, [], statistics)
    set_quantization(model, enabled=False)
    wanted = {name: outputs(model, images, name) for name in statistics}
    set_quantization(model, enabled=True)
    off = [
        sum(float((outputs(m, images, name) - wanted[name]).abs().mean()) for name in statistics)
        for m in (model, corrected)
    ]
    assert off[1] < 0.7 * off[0]


def test_a_layer_that_is_called_twice_is_not_corrected_from_batches(caplog: pytest.LogCaptureFixture) -> None:
    """Each of its calls shifts by another amount; what lies behind is corrected for both."""
    torch.manual_seed(0)
    shared = nn.Conv2d(3, 3, 1)
    model, images = nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU(), nn.Conv2d(3, 2, 1)), torch.randn(16, 3, 4, 4)
    model = student(model, images, weight=2)
    before = model[0].bias.detach().clone()
    set_quantization(model, enabled=False)
    wanted = outputs(model, images, "4")
    set_quantization(model, enabled=True)
    with caplog.at_level(logging.WARNING):
        FromBatches()(model, [images], {})
    torch.testing.assert_close(outputs(model, images, "4"), wanted, atol=1e-5, rtol=1e-5)
    assert torch.equal(model[0].bias, before)
    assert "bias is not corrected: 0: the layer is called more than once" in caplog.text


@pytest.mark.parametrize("correction", [FromStatistics(), FromBatches()], ids=["statistics", "batches"])
def test_a_shared_bias_is_not_corrected(correction: BiasCorrection, caplog: pytest.LogCaptureFixture) -> None:
    """What is right for one of its layers would shift the other; the layer behind is corrected."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 3, 1) for _ in range(3)]
    layers[1].bias = layers[0].bias
    model, images = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2]), torch.randn(64, 3, 4, 4)
    model = student(model, images, weight=2)
    biases = [model[place].bias.detach().clone() for place in (0, 2, 4)]
    with caplog.at_level(logging.WARNING):
        correction(model, [images], {"0": OutputStatistics(torch.zeros(3), torch.ones(3))})
    assert torch.equal(model[0].bias, biases[0]) and torch.equal(model[2].bias, biases[1])
    assert not torch.equal(model[4].bias, biases[2])
    assert "bias is not corrected: 0: its bias is also 2.bias, which would change with it" in caplog.text


@pytest.mark.parametrize("correction", [FromStatistics(), FromBatches()], ids=["statistics", "batches"])
def test_layer_without_bias_is_logged(correction: BiasCorrection, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)).train()
    images = torch.randn(16, 3, 4, 4)
    model(images)
    model = student(model.eval(), images)
    keys = list(model.state_dict())
    with caplog.at_level(logging.WARNING):
        correction(model, [images], {})
    assert "bias is not corrected: 0: the layer has no bias; quantize.fold=before" in caplog.text
    assert list(model.state_dict()) == keys


def test_correction_without_images_or_statistics_is_a_one_line_error() -> None:
    model = student(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)), torch.randn(2, 3, 4, 4))
    with pytest.raises(ValueError, match="there is no image to correct by; give images, or take bias=statistics"):
        FromBatches()(model, [], {})
    with pytest.raises(ValueError, match="has no batch norm that has seen training data"):
        FromStatistics()(model, [], {})


@pytest.mark.parametrize("rounding", [SQuant(), AdaRound(iterations=50, batch_size=16)], ids=["squant", "adaround"])
@pytest.mark.parametrize(
    ("correction", "left"), [(FromStatistics(), 0.8), (FromBatches(), 0.01)], ids=["statistics", "batches"]
)
def test_what_rounding_into_the_weights_shifts_is_corrected_too(
    rounding: Rounding, correction: BiasCorrection, left: float
) -> None:
    """The weights lie on the grid then, so that they do not tell by themselves what was rounded."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip
    for norm in (model[1], model[4]):
        nn.init.uniform_(norm.weight, 0.5, 2.0)  # type: ignore[arg-type]
        nn.init.uniform_(norm.bias, -0.5, 2.0)  # type: ignore[arg-type]
    for _ in range(30):
        model(torch.randn(32, 3, 12, 12))
    images = torch.randn(32, 3, 12, 12)
    statistics = fold_batchnorm_(model.eval(), images)
    wanted = outputs(copy.deepcopy(model), images, "3")
    model = student(model, images)
    exact = copy.deepcopy(model)
    rounding(model, [images], seed=0)
    before = (outputs(model, images, "3") - wanted).abs().mean()
    alone = copy.deepcopy(model)
    correction(alone, [images], statistics)
    correction(model, [images], statistics, exact=exact)
    after = (outputs(model, images, "3") - wanted).abs().mean()
    assert after < left * before
    assert after < (outputs(alone, images, "3") - wanted).abs().mean()


def test_images_of_several_sizes_are_refused() -> None:
    model, images, statistics = planted()
    model = student(model, images)
    with pytest.raises(ValueError, match="images of one size are needed"):
        FromBatches()(model, [images, images[..., :4]], statistics)
