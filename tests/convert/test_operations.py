"""Sums, products and softmax become modules without changing the function, and can then be quantized."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from qtrain.convert.calibrate import calibrate
from qtrain.convert.layers import find_layers, quant_layers
from qtrain.convert.operations import expose_operations, insert_operations_
from qtrain.convert.plan import LayerPlan, Policy, plan_layers
from qtrain.convert.swap import swap_layers
from qtrain.costs.count import OUTSIDE_LAYERS, count
from qtrain.models.factory import create_model
from qtrain.nn.operations import NormInput, Softmax
from qtrain.observers.min_max import MinMax
from qtrain.quantizers.uniform.affine import Affine
from qtrain.spec import LayerBits

RECIPE = LayerPlan(weight=Affine, input=Affine, weight_observer=MinMax, input_observer=MinMax)


def resnet() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return create_model(name="cifar_resnet8", num_classes=10, width=0.25).eval(), torch.randn(2, 3, 16, 16)


def vit() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=10, img_size=32, depth=2).eval()
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.uniform_(parameter, -0.5, 0.5)
    return model, torch.randn(2, 3, 32, 32)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "mobilenetv3_small_050"])
def test_residual_sums_of_timm_become_modules_bit_for_bit(name: str) -> None:
    torch.manual_seed(0)
    model, x = timm.create_model(name, num_classes=5).eval(), torch.randn(2, 3, 32, 32)
    original = copy.deepcopy(model)
    exposed = expose_operations(model, ["add"], x)
    assert exposed
    with torch.no_grad():
        assert torch.equal(model(x), original(x))
    assert model.state_dict().keys() == original.state_dict().keys()
    model.train(), original.train()
    torch.manual_seed(1)
    trained = model(x)
    torch.manual_seed(1)
    assert torch.equal(trained, original(x)), "drop path and dropout still follow the mode"


class Norms(nn.Module):
    """Norms that no layer takes in: of a sum, beside a layer, in a Sequential, in a layout of its own; and one that is
    merged, and one of the image itself."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.stem, self.merged = nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.beside, self.conv = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
        self.tail = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.GroupNorm(2, 8))
        self.last, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.merged(self.stem(self.image(x))))
        x = self.tail(self.beside(input=x) + self.conv(x))
        return self.head(self.last(x.permute(0, 2, 3, 1))).mean((1, 2))


@pytest.mark.parametrize(
    ("name", "options", "number"),
    [
        ("convnext_atto", {"dims": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}, 9),
        ("densenet121", {"growth_rate": 8, "block_config": (2, 2)}, 6),
    ],
)
def test_what_norms_of_timm_read_becomes_a_module_bit_for_bit(name: str, options: dict[str, Any], number: int) -> None:
    torch.manual_seed(0)
    model, x = timm.create_model(name, num_classes=5, **options).eval(), torch.randn(2, 3, 32, 32)
    original = copy.deepcopy(model)
    assert len(expose_operations(model, ["norm"], x)) == number
    with torch.no_grad():
        assert torch.equal(model(x), original(x))
    assert model.state_dict().keys() == original.state_dict().keys()
    assert insert_operations_(model, ["norm"]) == [], "there is nothing left to expose"


def test_norms_that_no_layer_takes_in_are_found_wherever_they_are_called() -> None:
    torch.manual_seed(0)
    model, x = Norms().eval(), torch.randn(2, 3, 8, 8)
    expected = model(x)
    assert expose_operations(model, ["norm"], x) == ["norm_0", "norm_1", "tail.norm_0"]
    assert torch.equal(model(x), expected)
    read: list[Tensor] = []
    given: list[Tensor] = []
    for name in ("beside", "tail.2", "last"):
        model.get_submodule(name).register_forward_pre_hook(lambda _, args: read.append(args[0]))
    for module in model.modules():
        if isinstance(module, NormInput):
            module.register_forward_hook(lambda *arguments: given.append(arguments[-1]))
    model(x)
    assert len(read) == 3 and all(one is other for one, other in zip(read, given, strict=True))


class Dense(nn.Module):
    """Concatenates the list that it is given, as a dense layer does."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 1)

    def forward(self, tensors: list[Tensor]) -> Tensor:
        return self.conv(torch.cat(tensors, 1))


class DenseBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Dense(3), Dense(7), Dense(11)])
        self.twice = Dense(8)

    def forward(self, x: Tensor) -> Tensor:
        tensors = [x]
        for layer in self.layers:
            tensors.append(layer(tensors))
        return self.twice(tensors[1:3]) + self.twice([tensors[2], tensors[3]])


def test_a_list_that_a_module_is_given_is_concatenated_with_a_quantizer_for_each_tensor() -> None:
    torch.manual_seed(0)
    model, x = DenseBlock().eval(), torch.randn(2, 3, 8, 8)
    expected = model(x)
    assert expose_operations(model, ["concat"], x) == ["layers.1.concat_0", "layers.2.concat_0"], "one tensor is none"
    assert [len(model.layers[place].concat_0.operands) for place in (1, 2)] == [2, 3]
    assert torch.equal(model(x), expected)


def test_a_resnet_has_a_sum_for_each_block() -> None:
    model, x = resnet()
    exposed = expose_operations(model, ["add"], x)
    assert exposed == [f"layer{i}.0.add.add_0" for i in (1, 2, 3)]
    found = find_layers(model, x)
    assert found.operands == {f"{name}.{side}": "add" for name in exposed for side in ("left", "right")}
    assert not set(found.weighted) & set(found.operands)
    assert found.kinds(found.weighted[-1])[-1] == "last", "operands are not the last layer"


def test_fused_attention_is_split_into_operations() -> None:
    model, x = vit()
    with torch.no_grad():
        expected = model(x)
    exposed = expose_operations(model, ["add", "matmul", "softmax"], x)
    kinds = [name.rpartition(".")[2].rpartition("_")[0] for name in exposed]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {"add": 4, "matmul": 4, "softmax": 2}
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def quantized(model: nn.Module, x: Tensor, kinds: dict[str, int]) -> nn.Module:
    expose_operations(model, kinds, x)
    found = find_layers(model, x)
    bits = {name: LayerBits(32, kinds[kind]) for name, kind in found.operands.items()}
    plans = plan_layers(found, bits, RECIPE)
    swap_layers(model, found, plans)
    calibrate(model, [x], plans)
    return model


def test_a_softmax_that_is_a_module_is_quantized_like_a_function() -> None:
    images = torch.rand(4, 6, 5)
    modules = nn.Sequential(nn.Softmax(1), nn.Softmax())
    assert insert_operations_(modules, ["softmax"]) == ["0"]
    assert isinstance(modules[0], Softmax)
    torch.testing.assert_close(modules[0](images), images.softmax(1), rtol=0, atol=0)
    assert type(modules[1]) is nn.Softmax, "over which axis is not said"


def test_the_operands_of_a_sum_are_quantized() -> None:
    """Worked by hand on one block: the sum is that of two rounded tensors."""
    model, x = resnet()
    original = copy.deepcopy(model)
    quantized(model, x, {"add": 3})
    block, before = model.layer1[0], original.layer1[0]
    with torch.no_grad():
        stem = original.act1(original.bn1(original.conv1(x)))
        branch = before.bn2(before.conv2(before.act1(before.bn1(before.conv1(stem)))))
        left, right = (
            getattr(block.add.add_0, side).input_quantizer.quantize(v).dequantize()
            for side, v in (("left", branch), ("right", stem))
        )
        assert torch.equal(block(stem), before.act2(left + right))
        assert left.unique().numel() <= 8 and not torch.equal(left, branch)


def test_residual_path_with_more_bits_is_closer_to_full_precision() -> None:
    """More bits on the residual path, the branches as they are (1812.09818)."""
    errors = []
    for bits in (2, 8):
        model, x = resnet()
        with torch.no_grad():
            expected = model(x)
            errors.append((quantized(model, x, {"add": bits})(x) - expected).square().mean().item())
    assert errors[1] < errors[0] / 10


def test_cost_counts_products_of_operands_with_their_bits() -> None:
    model, x = vit()
    before = count(model, x)
    model = quantized(model, x, {"matmul": 4, "softmax": 8})
    after = count(model, x)
    rows = {layer.name: layer for layer in after.layers}
    product = rows["blocks.0.attn.matmul_0"]
    heads, tokens = model.blocks[0].attn.num_heads, (32 // 16) ** 2 + 1
    width = model.blocks[0].attn.head_dim
    assert product.macs == heads * tokens * tokens * width
    assert (product.weight_bits, product.input_bits, product.bops) == (4, 4, product.macs * 16)
    assert after.macs == before.macs
    assert OUTSIDE_LAYERS not in rows
    quantizers = [layer.input_quantizer for layer in quant_layers(model).values()]
    assert after.size_bytes - before.size_bytes == 4 * len(quantizers), "a scale for each operand"


def test_model_with_exposed_operations_trains_and_compiles() -> None:
    model, x = resnet()
    quantized(model, x, {"add": 4}).train()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss = compiled(x).square().mean()
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_policies_apply_to_operands() -> None:
    model, x = resnet()
    expose_operations(model, ["add"], x)
    found = find_layers(model, x)
    plans = plan_layers(
        found,
        dict.fromkeys(found.operands, LayerBits(32, 4)),
        RECIPE,
        {"highway": Policy(kinds=["add"], input_bits=16)},
    )
    assert {plans[name].bits for name in found.operands} == {(32, 16)}


class ModeDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.fc(x), 0.5, self.training) + self.fc(x)


class BranchOnValue(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + x if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("module", "reason"),
    [(ModeDependent(), "depends on the mode"), (BranchOnValue(), "cannot be traced")],
    ids=["mode", "branch"],
)
def test_operations_that_cannot_be_exposed_stay_and_are_logged(
    module: nn.Module, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.INFO, logger="qtrain"),
        pytest.raises(ValueError, match=r"operations.add: Sequential has none"),
    ):
        expose_operations(nn.Sequential(module), ["add"], torch.ones(1, 3))
    assert reason in caplog.text


def test_unknown_kinds_are_refused() -> None:
    model, x = resnet()
    with pytest.raises(ValueError, match=r"operations: no kind \['divide'\]; use \['activation'"):
        expose_operations(model, ["divide"], x)
