"""Batch norm folded: the same function, nothing left of the norm, and its statistics handed on."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qtrain
from qtrain.convert.calibrate import calibrate_weights, observe_weights
from qtrain.convert.fold import fold_batchnorm_, fold_in_training_, same_output
from qtrain.convert.layers import find_layers
from qtrain.convert.plan import LayerPlan, plan_layers
from qtrain.convert.swap import swap_layers
from qtrain.models.factory import create_model
from qtrain.nn.base import quantized_weight
from qtrain.observers.min_max import MinMax
from qtrain.quantizers.uniform.affine import Affine
from qtrain.spec import FULL_PRECISION, LayerBits, PerChannel

MODELS: dict[str, dict[str, Any]] = {
    "cifar_resnet8": {},
    "cifar_resnet8-B": {"shortcut": "B"},
    "test_resnet": {},
    "test_efficientnet": {},
}


RECIPE = LayerPlan(weight=Affine, input=Affine, weight_observer=MinMax, input_observer=MinMax)


def made(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return create_model(name=name.split("-")[0], num_classes=10, in_channels=3, image_size=16, **options)


def norms(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "BatchNorm" in type(module).__name__]


@pytest.mark.parametrize("name", MODELS)
def test_folded_model_computes_the_same_function(name: str, settle: Any) -> None:
    model = settle(made(name, **MODELS[name]), size=32, images=32)
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        expected, count = model(images), len(norms(model))
        statistics = fold_batchnorm_(model, images[:1])
        folded = model(images)
    assert len(statistics) == count > 0
    assert norms(model) == []
    assert not any("running" in key for key in model.state_dict())
    assert float((folded - expected).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(4, 6, 3, groups=2),
        nn.Conv2d(4, 6, 3, bias=False),
        nn.Conv3d(4, 6, 1),
        nn.ConvTranspose2d(4, 6, 3, groups=2),
        nn.Linear(4, 6),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_batch_norm_folds_into_every_kind_of_layer(layer: nn.Module, settle: Any) -> None:
    axes = {"Conv1d": 1, "Conv2d": 2, "Conv3d": 3, "ConvTranspose2d": 2, "Linear": 0}[type(layer).__name__]
    norm = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[axes](6)
    model = nn.Sequential(layer, norm).train()
    images = torch.randn(64, 4, *(5 for _ in range(axes)))
    with torch.no_grad():
        nn.init.uniform_(norm.weight, -1.5, 1.5)
        nn.init.normal_(norm.bias)
        model(images)
        model.eval()
        expected = model(images)
        fold_batchnorm_(model, images[:1])
        torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-5)
    assert type(model[1]) is nn.Identity


def test_statistics_are_the_moments_of_the_folded_output() -> None:
    # Of normal images through one linear map the outputs are normal, so beta and gamma are what one measures.
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, momentum=None), nn.ReLU())
    nn.init.uniform_(model[1].weight, -2, 2)
    nn.init.normal_(model[1].bias)
    images = torch.randn(64, 3, 12, 12)
    with torch.no_grad():
        model.train()(images)
        statistics = fold_batchnorm_(model.eval(), images[:1])["0"]
        output = model[0](images).transpose(0, 1).flatten(1)
    torch.testing.assert_close(statistics.mean, output.mean(dim=1), atol=1e-4, rtol=0)
    torch.testing.assert_close(statistics.std, output.std(dim=1), atol=1e-3, rtol=1e-3)


def test_norms_that_cannot_be_folded_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm1 = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            self.before = nn.BatchNorm2d(4)  # follows a sum
            self.twice, self.norm2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
            self.blind, self.norm3 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)
            self.read, self.norm4 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)  # its output goes to a sum as well

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm1(self.first(x))
            x = self.before(x + x)
            x = self.norm2(self.twice(self.twice(x)))
            x = self.norm3(self.blind(x))
            x = self.read(x)
            return x + self.norm4(x)

    model, images = Odd().eval(), torch.randn(4, 3, 5, 5)
    with torch.no_grad():
        expected = model(images)
    with caplog.at_level(logging.WARNING):
        assert fold_batchnorm_(model, images) == {}  # the one that is folded has seen no data
    with torch.no_grad():
        torch.testing.assert_close(model(images), expected)
    assert norms(model) == ["before", "norm2", "norm3", "norm4"]
    for part in ("before, norm4: it does not directly follow", "norm2: it, or the layer", "norm3: it keeps no running"):
        assert part in caplog.text


def test_fold_without_batch_norm_is_a_one_line_error() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    with pytest.raises(ValueError, match=r"quantize.fold=before: Sequential has no batch norm .* leave quantize.fold="):
        fold_batchnorm_(model, torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match=r"quantize.fold=training: Sequential has no batch norm"):
        fold_in_training_(model, torch.zeros(1, 3, 4, 4))


def test_a_model_that_cannot_be_traced_is_named() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) if bool(x.sum() > 0) else x

    with pytest.raises(ValueError, match=r"Branching cannot be traced by torch\.fx"):
        fold_batchnorm_(Branching(), torch.zeros(1, 3, 4, 4))


def test_fold_keeps_modes_and_attributes(settle: Any) -> None:
    model = settle(made("cifar_resnet8")).train()
    model.layer1.eval()
    before = set(vars(model))
    fold_batchnorm_(model, torch.zeros(1, 3, 16, 16))
    assert model.training and not model.layer1[0].conv1.training
    assert set(vars(model)) == before


def converted(model: nn.Module, example: Tensor, bits: int = 4, recipe: LayerPlan = RECIPE) -> nn.Module:
    found = find_layers(model, example)
    plans = plan_layers(found, {name: LayerBits(bits, FULL_PRECISION) for name in found.weighted}, recipe)
    swap_layers(model, found, plans)
    return model


def calibrated(model: nn.Module) -> nn.Module:
    plans = dict.fromkeys([name for name, _ in model.named_modules()], RECIPE)
    calibrate_weights(model, observe_weights(model, plans))
    return model


def test_model_folded_in_training_computes_in_eval_what_is_deployed(settle: Any) -> None:
    model, images = settle(made("cifar_resnet8")), torch.randn(8, 3, 16, 16)
    deployed = copy.deepcopy(model)
    fold_batchnorm_(deployed, images[:1])
    deployed = calibrated(converted(deployed, images[:1]))
    plain = calibrated(converted(copy.deepcopy(model), images[:1]))
    student = converted(model, images[:1])
    names = fold_in_training_(student, images[:1])
    calibrated(student)
    with torch.no_grad():
        expected, other = deployed(images), plain(images)
        torch.testing.assert_close(student.eval()(images), expected, atol=1e-4, rtol=1e-4)
    assert len(names) == 7
    assert float((other - expected).abs().max()) > 1e-2  # rounded before the norm, it is another model


def test_layers_not_rounded_as_merged_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 4), nn.BatchNorm1d(4))
    student = converted(model.eval(), torch.zeros(1, 3, 4, 4))
    with caplog.at_level(logging.WARNING):
        assert fold_in_training_(student, torch.zeros(1, 3, 4, 4)) == ["0"]
    assert "4: only the weights of convolutions are" in caplog.text


@pytest.mark.parametrize("part", ["weight", "bias"])
@pytest.mark.parametrize("when", ["before", "training"])
def test_norm_behind_a_layer_with_a_shared_parameter_is_not_folded(
    part: str, when: str, settle: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Each of two norms would scale the one parameter for both layers. Rounding as merged does not touch a bias."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)]
    model = settle(nn.Sequential(*layers, nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), channels=4)
    setattr(model[2], part, getattr(model[0], part))
    images = torch.randn(2, 4, 8, 8)
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        expected = model(images)
        if when == "before":
            assert fold_batchnorm_(model, images[:1]).keys() == {"4"}
            torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-5)
        else:
            found = find_layers(model, images[:1])
            plans = plan_layers(found, {name: LayerBits(4, FULL_PRECISION) for name in found.layers}, RECIPE)
            swap_layers(model, found, plans)
            assert fold_in_training_(model, images[:1]) == (["4"] if part == "weight" else ["0", "2", "4"])
    reason = f"1: its {part} is also 2.{part}, which would change with it"
    assert (reason in caplog.text) == (when == "before" or part == "weight")


def behind(gamma: list[float]) -> tuple[nn.Sequential, Tensor]:
    """A convolution at 4 bits and its norm, rounded as merged and calibrated while the norm has these gammas."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)).eval()
    nn.init.uniform_(model[1].running_var, 0.2, 3)
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor(gamma))
    weight = model[0].weight.detach().clone()
    recipe = replace(RECIPE, weight=partial(Affine, granularity=PerChannel()))
    student = converted(model, torch.zeros(1, 3, 4, 4), bits=4, recipe=recipe)
    fold_in_training_(student, torch.zeros(1, 3, 4, 4))
    return calibrated(student), weight


@pytest.mark.parametrize("gamma", [[0.0] * 4, [1e-3] * 4, [0.0, 1.5, -1e-3, 0.5]], ids=str)
def test_weights_do_not_clip_once_a_gamma_near_zero_has_grown(
    gamma: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    """The error is that of rounding each channel by itself, at most half a step of max |W| / 7, whatever gamma is."""
    student, weight = behind(gamma)
    half_step = weight.abs().amax(dim=(1, 2, 3), keepdim=True) / 7 / 2
    with torch.no_grad():
        for now in (torch.tensor(gamma).clamp(min=1e-3), torch.tensor([0.3, 1.5, -0.8, 0.5])):
            student[1].weight[torch.tensor(gamma).abs() < 0.01] = now[torch.tensor(gamma).abs() < 0.01]
            off = (quantized_weight(student[0]) - weight).abs()
            assert bool((off <= 1.01 * half_step).all())
    said = "all its gammas are near 0" if gamma[1] < 1 else "2 of its 4 gammas are near 0; these channels are rounded"
    assert f"weights are not rounded as merged with batch norm: 1: {said}" in caplog.text


def test_channels_with_other_gammas_are_still_rounded_as_merged() -> None:
    alone, mixed = behind([1.0, 1.5, -1.0, 0.5])[0], behind([0.0, 1.5, -1e-3, 0.5])[0]
    live = [1, 3]
    with torch.no_grad():
        assert torch.equal(quantized_weight(mixed[0])[live], quantized_weight(alone[0])[live])
        mixed[1].weight.mul_(0.7)
        alone[1].weight.mul_(0.7)
        assert torch.equal(quantized_weight(mixed[0])[live], quantized_weight(alone[0])[live])


@pytest.mark.parametrize("target", [None, "onnxruntime"])
def test_a_norm_over_tokens_behind_a_linear_layer_is_left(target: str | None, caplog: pytest.LogCaptureFixture) -> None:
    """Of (N, 4, 8) it normalizes the second axis, and the layer's outputs are the last one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(64, 3)).eval()
    images = torch.randn(6, 4, 8)
    with torch.no_grad():
        expected = model(images)
    if target is None:
        assert fold_batchnorm_(model, images) == {}
        assert "1: it normalizes another axis than that of the layer's outputs" in caplog.text
        torch.testing.assert_close(model(images), expected)
    else:
        student = qtrain.quantize(model, images, target=target)
        assert isinstance(student.get_submodule("1"), nn.BatchNorm1d)


class Tokens(nn.Module):
    """A folded convolution, and a batch norm over the 4 channels of (N, 4, 4) behind a linear layer of 4 outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.conv_norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.mix, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.mix(self.conv_norm(self.conv(x)).flatten(2)))


class Twice(nn.Module):
    """Gives a dict of two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> dict[str, Any]:
        features = self.norm(self.conv(x))
        return {"logits": self.head(features.mean((2, 3))), "features": (features, None)}


def with_statistics(model: nn.Module, images: Tensor) -> nn.Module:
    torch.manual_seed(0)
    for _ in range(3):
        model(images)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2.0)
    return model.eval()


def test_a_norm_over_another_axis_of_as_many_channels_stays(caplog: pytest.LogCaptureFixture) -> None:
    images = torch.randn(8, 3, 4, 4)  # whose convolution gives four places
    model = with_statistics(Tokens(), images)
    expected = model(images)
    with caplog.at_level(logging.INFO):
        fold_batchnorm_(model, images[:1])
    assert norms(model) == ["norm"]
    assert "it normalizes another axis than that of the layer's outputs" in caplog.text
    assert torch.allclose(model(images), expected, atol=1e-5)


@pytest.mark.parametrize("options", [{"fold": "before"}, {"fold": "before", "equalize": "cross_layer"}])
def test_a_network_with_several_outputs_is_folded(options: dict[str, str]) -> None:
    images = torch.randn(8, 3, 8, 8)
    model = with_statistics(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), Twice()), images)
    student = qtrain.quantize(model, images, weight_bits=8, input_bits=8, **options)
    assert norms(student) == []
    assert torch.allclose(student(images)["logits"], model(images)["logits"], atol=0.1)


def test_all_tensors_of_an_output_are_compared() -> None:
    one, other = torch.ones(2), torch.ones(3)
    assert same_output([one, other], [one, other + 1e-5])
    assert not same_output([one, other], [one, other + 0.1])
    assert not same_output([one], [one, other])
    assert same_output([one[:0]], [one[:0]])
