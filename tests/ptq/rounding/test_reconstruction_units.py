"""Which parts of a model are reconstructed: of residual networks their blocks, in the order of the forward."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from qtrain.allocate.uniform import Uniform
from qtrain.convert.layers import find_layers, quant_layers
from qtrain.convert.plan import LayerPlan, plan_layers
from qtrain.convert.swap import swap_layers
from qtrain.models import cifar_resnet  # noqa: F401 - registers the models
from qtrain.observers.min_max import MinMax
from qtrain.ptq.rounding.reconstruction_units import blocks_of, in_order, layers_of, record_part
from qtrain.quantizers.uniform.lsq import LSQ

RECIPE = LayerPlan(weight=LSQ, input=LSQ, weight_observer=MinMax, input_observer=MinMax)


def converted(model: nn.Module, images: Tensor) -> nn.Module:
    found = find_layers(model, images)
    plans = plan_layers(found, Uniform(weight=4, input=4)(found.weighted), RECIPE)
    swap_layers(model, found, plans)
    return model.eval()


def made(name: str, size: int = 32, **options: Any) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    images = torch.randn(2, 3, size, size)
    return converted(timm.create_model(name, num_classes=10, **options).eval(), images), images


BLOCKS = {
    "cifar_resnet8": ["conv1", "layer1.0", "layer2.0", "layer3.0", "linear"],
    "test_resnet": ["conv1.0", "conv1.3", "conv1.6", "layer1.0", "layer2.0", "layer3.0", "layer4.0", "fc"],
    "test_vit": ["patch_embed.proj", *(f"blocks.{i}" for i in range(6)), "head"],
    "test_efficientnet": ["conv_stem", *(f"blocks.{i}.0" for i in range(5)), "conv_head", "classifier"],
    "test_convnext": [
        *("stem.0", "stages.0.blocks.0", "stages.1.downsample.1", "stages.1.blocks.0", "stages.1.blocks.1"),
        *("stages.2.downsample.1", *(f"stages.2.blocks.{i}" for i in range(4)), "stages.3.downsample.1"),
        *("stages.3.blocks.0", "stages.3.blocks.1", "head.fc"),
    ],
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_finds_repeated_modules(name: str) -> None:
    model, images = made(name, **({"img_size": 32} if name == "test_vit" else {}))
    blocks = blocks_of(model)
    assert in_order(model, blocks, images) == (BLOCKS[name], {})
    held = [layer for layer in quant_layers(model) for block in blocks if f"{layer}.".startswith(f"{block}.")]
    assert held == list(quant_layers(model)), "each layer is in one block"


def hand_made() -> tuple[nn.Module, Tensor]:
    """Convolutions one after the other, in lists within lists: nothing that a residual network would repeat."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)),
        nn.Sequential(nn.Conv2d(4, 5, 3), nn.ReLU(inplace=True), nn.Flatten()),
        nn.Linear(80, 3),
    )
    images = torch.randn(4, 3, 8, 8)
    return converted(model, images), images


def test_blocks_of_a_plain_network_are_its_layers() -> None:
    model, _ = hand_made()
    assert blocks_of(model) == layers_of(model) == ["0.0", "1.0", "2"]


def test_patterns_name_blocks_and_other_layers_are_parts_by_themselves() -> None:
    model, _ = hand_made()
    assert blocks_of(model, ["0"]) == ["0", "1.0", "2"]
    assert blocks_of(model, ["?", "0.?"]) == ["0", "1", "2"], "the outermost match"
    resnet, _ = made("cifar_resnet8")
    assert blocks_of(resnet, ["layer*"]) == ["conv1", "layer1", "layer2", "layer3", "linear"]
    with pytest.raises(
        ValueError, match=r"pattern 'layer4' matches no part with quantized layers; did you mean 'layer"
    ):
        blocks_of(resnet, ["layer4"])


def test_record_part_returns_inputs_and_outputs_of_a_forward() -> None:
    """The ReLU behind works in place, on a tensor that is not the one that was kept."""
    model, images = hand_made()
    model.train()
    with torch.no_grad():
        inside = model[0](images)
        expected = model[1][0](inside)
        seen = record_part(model, "1.0", [images[:3], images[3:]])
    assert torch.equal(seen.inputs, inside)
    torch.testing.assert_close(seen.outputs, expected)
    assert (seen.outputs < 0).any()
    assert seen.options == ((), {})
    assert model.training


class Odd(nn.Module):
    """Two tensors into one part, a part twice, one never, one for another number of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.two = nn.Bilinear(3, 3, 3)
        self.twice, self.never, self.rows = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.fine = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(x, x)
        x = self.twice(self.twice(self.fine(x)))
        return self.rows(x.reshape(-1, 1, 3).repeat(2, 1, 1))[: len(x), 0]


def test_parts_that_cannot_be_replayed_are_left_out_with_the_reason() -> None:
    order, reasons = in_order(Odd(), ["two", "twice", "never", "rows", "fine"], torch.randn(2, 3))
    assert order == ["fine"]
    tensors = "its input and its output are not one tensor each, with a row for each image"
    assert reasons == {
        "two": tensors,
        "twice": "a forward calls it more than once",
        "rows": tensors,
        "never": "a forward never calls it",
    }


class WithSkips(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor, skips: list[Tensor]) -> Tensor:
        return self.conv(x) + skips[0]  # type: ignore[no-any-return]


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = WithSkips()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x, [x.relu()])  # type: ignore[no-any-return]


def test_a_part_that_is_given_a_list_of_tensors_is_left_out() -> None:
    """Their rows belong to the images, which are put into another order."""
    images = torch.randn(2, 3, 8, 8)
    order, reasons = in_order(converted(Decoder(), images), ["block"], images)
    assert order == [] and "not one tensor each" in reasons["block"]
