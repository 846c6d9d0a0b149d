"""Conversion changes a model's bits and nothing else: over families of timm, bit for bit with quantizers off."""

from __future__ import annotations

import copy
import logging
from functools import partial

import pytest
import timm
import torch
from torch import Tensor, nn

import qtrain
from qtrain.allocate.uniform import Uniform
from qtrain.convert.calibrate import calibrate
from qtrain.convert.layers import Quantizable, find_layers, quant_layers, set_quantization
from qtrain.convert.plan import LayerPlan, plan_layers
from qtrain.convert.swap import swap_layers
from qtrain.models.factory import create_model
from qtrain.models.layer_kinds import merge_fused_biases
from qtrain.nn import Operand, QuantConv, QuantLayer, QuantLinear
from qtrain.observers.min_max import MinMax
from qtrain.quantizers.uniform.lsq import LSQ
from qtrain.spec import LayerBits, PerChannel

SMALL: dict[str, tuple[int, dict[str, object]]] = {
    "cifar_resnet8": (16, {}),
    "test_resnet": (32, {}),
    "test_efficientnet": (32, {}),
    "test_byobnet": (32, {}),
    "test_convnext": (32, {}),
    "test_convnext3": (32, {}),
    "test_mambaout": (32, {}),
    "test_vit": (32, {"img_size": 32}),
    "test_vit_relpos": (32, {"img_size": 32}),
    "test_coatnet": (64, {"img_size": 64}),
    "test_maxvit": (64, {"img_size": 64}),
    "test_nfnet": (32, {}),  # ScaledStdConv2d
    "resnetv2_50": (32, {"layers": (1, 1, 1, 1), "channels": (16, 32, 32, 64), "stem_chs": 16}),  # pre-activation
    "resnetv2_50x1_bit": (32, {}),  # StdConv2d
    "regnetx_002": (32, {}),
    "mobilenetv3_small_050": (32, {}),
    "tf_mobilenetv3_small_minimal_100": (33, {}),  # Conv2dSame
    "tf_efficientnetv2_b0": (33, {}),
    "mixnet_s": (32, {}),  # mixed kernels
    "densenet121": (32, {"block_config": (2, 2, 2, 2)}),
    "swin_tiny_patch4_window7_224": (
        28, {"img_size": 28, "window_size": 7, "depths": (1, 1), "num_heads": (2, 4), "embed_dim": 16},
    ),
    "swinv2_tiny_window8_256": (
        32, {"img_size": 32, "window_size": 4, "depths": (1, 1), "num_heads": (2, 4), "embed_dim": 16},
    ),
    "beit_base_patch16_224": (32, {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2}),
    "eva02_tiny_patch14_224": (28, {"img_size": 28, "depth": 2, "embed_dim": 32, "num_heads": 2}),
    "mixer_s32_224": (64, {"img_size": 64}),
    "levit_128s": (32, {"img_size": 64}),
    "repvgg_a0": (32, {}),
    "ghostnet_050": (32, {}),
    "edgenext_xx_small": (64, {}),
}  # fmt: skip
"""Name -> image size and options that make it small."""


def small(name: str) -> tuple[nn.Module, Tensor]:
    size, options = SMALL[name]
    size = int(options.get("img_size", size))  # type: ignore[call-overload]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **options)
    # As after training, so that no branch counts for nothing: fresh models have zeros in heads, gains and layer scales.
    for parameter in model.parameters():
        if parameter.ndim <= 1 or not parameter.any():
            nn.init.uniform_(parameter, -0.5, 1.0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval(), torch.randn(2, 3, size, size)


RECIPE = LayerPlan(
    weight=partial(LSQ, granularity=PerChannel(0)), input=LSQ, weight_observer=MinMax, input_observer=MinMax
)


def calibrate_all(model: nn.Module, images: list[Tensor]) -> None:
    calibrate(model, images, dict.fromkeys(quant_layers(model), RECIPE))


def convert(model: nn.Module, x: Tensor, bits: int = 4) -> Quantizable:
    found = find_layers(model, x[:1])
    allocation = Uniform(weight=bits, input=bits)(list(found.layers))
    swap_layers(model, found, plan_layers(found, allocation, RECIPE))
    return found


@pytest.mark.parametrize("name", SMALL)
def test_model_with_quantizers_off_computes_the_original_output(name: str) -> None:
    original, x = small(name)
    merge_fused_biases(original)
    converted = copy.deepcopy(original)
    keys = set(original.state_dict())
    found = convert(converted, x)
    with torch.no_grad():
        expected = original(x)
        set_quantization(converted, enabled=False)
        assert torch.isfinite(expected).all()
        assert expected.std() > 0
        assert torch.equal(converted(x), expected)
        set_quantization(converted, enabled=True)
        calibrate_all(converted, [x])
        assert not torch.equal(converted(x), expected), "with quantizers on it is another function"

    # Names stay, save that the gain of a scaled convolution now belongs to its weight transform.
    assert keys <= {key.replace("weight_transform.", "") for key in converted.state_dict()}
    for path, module in original.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear | nn.Embedding):
            replaced = isinstance(converted.get_submodule(path), QuantLayer)
            assert replaced != (path in found.skipped), f"{path} is neither converted nor skipped with a reason"
            assert replaced == (path in found.layers)
    assert all(found.skipped.values())
    assert len(found.layers) > 3


def tiny() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = create_model(name="cifar_resnet8", num_classes=10, width=0.25)
    return model.eval(), torch.randn(4, 3, 16, 16)


def test_find_layers_returns_layers_in_forward_order() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first = nn.Linear(4, 2), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x))

    assert list(find_layers(Backwards(), torch.zeros(1, 3)).layers) == ["first", "last"]


def test_skipped_layers_are_logged_with_their_reason(caplog: pytest.LogCaptureFixture) -> None:
    class Twofold(nn.Bilinear):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x, x)

    model = nn.Sequential(nn.Conv2d(3, 4, 3), Twofold(6, 6, 6), nn.Conv2d(4, 4, 1))
    with caplog.at_level(logging.INFO, logger="qtrain"):
        found = find_layers(model, torch.zeros(1, 3, 8, 8))
        bits = {"0": LayerBits(4, 4), "2": LayerBits(32, 32)}
        swap_layers(model, found, plan_layers(found, bits, RECIPE))
    assert found.skipped == {"1": "a bilinear layer has no quantized form"}
    assert [record.getMessage() for record in caplog.records] == [
        "left in full precision: 1: a bilinear layer has no quantized form",
        "left in full precision: 2: the allocation gives it no bits",
    ]
    assert isinstance(model[0], QuantConv)
    assert type(model[2]) is nn.Conv2d


def test_an_operand_that_a_target_leaves_alone_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    model, x = tiny()
    with caplog.at_level(logging.INFO, logger="qtrain"):
        student = qtrain.quantize(model, x, target="openvino")
    assert any(isinstance(module, Operand) and module.input_quantizer is None for module in student.modules())
    assert "left in full precision" not in caplog.text


def test_a_layer_that_never_runs_is_skipped() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    found = find_layers(Idle(), torch.zeros(1, 3))
    assert list(found.layers) == ["used"]
    assert found.skipped["idle"].startswith("never called")


def test_a_layer_with_two_names_is_converted_under_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(3, 3)
            self.again = self.one

        def forward(self, x: Tensor) -> Tensor:
            return self.again(self.one(x).relu())

    model = Twice()
    convert(model, torch.zeros(1, 3))
    assert isinstance(model.one, QuantLinear)
    assert model.again is model.one


def test_allocation_with_unquantizable_layer_names_is_refused() -> None:
    model, x = tiny()
    found = find_layers(model, x)
    with pytest.raises(ValueError, match=r"allocation: layer 'layer1.0.conv9' cannot be quantized.*layer1.0.conv1"):
        plan_layers(found, {"layer1.0.conv9": LayerBits(4, 4)}, RECIPE)


def test_weights_and_inputs_can_be_quantized_separately() -> None:
    model, x = tiny()
    bits = {"conv1": LayerBits(4, 32), "linear": LayerBits(32, 4)}
    found = find_layers(model, x)
    swap_layers(model, found, plan_layers(found, bits, RECIPE))
    layers = quant_layers(model)
    assert list(layers) == ["conv1", "linear"]
    assert layers["conv1"].input_quantizer is None
    assert layers["linear"].weight_quantizer is None


def test_calibration_runs_in_full_precision_and_restores_modes() -> None:
    model, x = tiny()
    seen: list[Tensor] = []
    original = copy.deepcopy(model)
    original.linear.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    original(x)
    convert(model, x, bits=2)
    model.train()
    model.layer1.eval()
    statistics = model.bn1.running_mean.clone()
    calibrate_all(model, [x[:2], x[2:]])
    assert model.training
    assert not model.layer1[0].bn1.training
    assert model.layer2[0].bn1.training
    assert torch.equal(model.bn1.running_mean, statistics)
    quantizer = quant_layers(model)["linear"].input_quantizer
    assert quantizer is not None
    expected = LSQ(spec=quantizer.spec)
    observer = MinMax(granularity=expected.granularity)
    observer.update(seen[0])
    expected.calibrate_(observer.observed(2))
    torch.testing.assert_close(quantizer.scale, expected.scale)
    assert not bool(quantizer.signed), "after a ReLU"
    for layer in quant_layers(model).values():
        for part in (layer.weight_quantizer, layer.input_quantizer):
            assert part is not None
            assert bool(part.initialized)
            assert part.enabled


def test_calibration_without_images_is_refused() -> None:
    model, x = tiny()
    convert(model, x)
    with pytest.raises(ValueError, match="calibrate: layer 'conv1' saw no image; give at least one calibration batch"):
        calibrate_all(model, [])


def test_more_bits_give_outputs_closer_to_full_precision() -> None:
    errors = []
    for bits in (2, 4, 8):
        model, x = tiny()
        with torch.no_grad():
            expected = model(x)
            convert(model, x, bits=bits)
            calibrate_all(model, [x])
            errors.append((model(x) - expected).square().mean().item())
    assert errors[0] > errors[1] > errors[2]


def test_uniform_bits_with_separate_first_and_last() -> None:
    bits = Uniform(weight=2, input=4, first=LayerBits(8, 8), last=LayerBits(8, 32))(["a", "b", "c"])
    assert bits == {"a": (8, 8), "b": (2, 4), "c": (8, 32)}
    assert Uniform(weight=2, input=2)([]) == {}
    with pytest.raises(ValueError, match=r"Uniform: first.weight must be 1..16 bits, or 32 for full precision, got 0"):
        Uniform(weight=2, input=2, first=LayerBits(0, 8))
