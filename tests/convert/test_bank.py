"""A bank of quantizers puts a model at any allocation as a conversion at that allocation would."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtrain.convert.bank import QuantizerBank, Widths, make_bank
from qtrain.convert.calibrate import calibrate
from qtrain.convert.fold import fold_in_training_
from qtrain.convert.layers import find_layers, quantizers_of
from qtrain.convert.operations import expose_operations
from qtrain.convert.plan import LayerPlan, Policy, plan_layers
from qtrain.convert.swap import swap_layers
from qtrain.convert.tensors import readings, share_quantizers_
from qtrain.costs.count import count
from qtrain.observers.min_max import MinMax
from qtrain.observers.squared_error import SquaredError
from qtrain.quantizers.base import Quantizer
from qtrain.quantizers.codebook.apot import APoT
from qtrain.quantizers.codebook.kmeans import KMeans
from qtrain.quantizers.uniform.affine import Affine
from qtrain.quantizers.uniform.lsq import LSQ
from qtrain.spec import FULL_PRECISION, Allocation, Choice, LayerBits, PerChannel

WIDTHS = Widths((2, 3, 8), (3, 8, FULL_PRECISION))
RECIPE = LayerPlan(
    weight=partial(LSQ, granularity=PerChannel()), input=LSQ, weight_observer=MinMax, input_observer=SquaredError
)


class Net(nn.Module):
    """A convolution with batch norm, a depthwise one, a residual sum, two linear layers with one weight, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 8, 1)
        self.mix, self.again, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        self.again.weight = self.mix.weight

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.point(F.relu(self.depthwise(x)))
        return self.head(F.relu(self.again(F.relu(self.mix(x.mean((2, 3)))))))


def net() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, images = Net(), torch.randn(16, 3, 8, 8)
    nn.init.uniform_(model.norm.weight, 0.5, 1.5)
    model(images)
    return model.eval(), images


def banked(recipe: LayerPlan = RECIPE, widths: Widths = WIDTHS, **options: Any) -> tuple[QuantizerBank, Tensor]:
    model, images = net()
    return make_bank(model, find_layers(model, images[:2]), recipe, widths, list(images.split(8)), **options), images


def direct(
    allocation: Allocation, recipe: LayerPlan = RECIPE, policies: Any = None, *, fold: bool = False
) -> nn.Module:
    model, images = net()
    found = find_layers(model, images[:2])
    plans = plan_layers(found, allocation, recipe, policies)
    swap_layers(model, found, plans)
    if fold:
        fold_in_training_(model, images[:2])
    calibrate(model, images.split(8), plans)
    return model.eval()


def assert_same(banked: nn.Module, direct: nn.Module, images: Tensor) -> None:
    banked.eval()
    with torch.no_grad():
        assert torch.equal(banked(images), direct(images))
    state = banked.state_dict()
    assert state.keys() == direct.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in direct.state_dict().items())


NAMES = ("stem", "depthwise", "point", "mix", "again", "head")
UNIFORM = dict.fromkeys(NAMES, LayerBits(3, 8))
MIXED = dict(zip(NAMES, map(LayerBits, (8, 2, 3, 2, 2, 3), (FULL_PRECISION, 3, 8, 3, 8, 3)), strict=True))
PARTLY = {"point": LayerBits(2, 3), "mix": LayerBits(FULL_PRECISION, 3), "head": LayerBits(8, FULL_PRECISION)}
ALLOCATIONS = {"uniform": UNIFORM, "mixed": MIXED, "partly": PARTLY, "none": {}}
RECIPES = {
    "lsq": RECIPE,
    "kmeans": LayerPlan(weight=KMeans, input=Affine, weight_observer=MinMax, input_observer=MinMax),
    "apot": LayerPlan(weight=APoT, input=APoT, weight_observer=MinMax, input_observer=MinMax),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_bank_at_an_allocation_is_a_conversion_at_it_bit_for_bit(recipe: str) -> None:
    """K-means cannot change its bits, so a bank that switched them would fail."""
    bank, images = banked(RECIPES[recipe])
    for order in (list(ALLOCATIONS), list(ALLOCATIONS)[::-1]):
        for name in order:
            bank.use_(ALLOCATIONS[name])
            assert_same(bank.model, direct(ALLOCATIONS[name], RECIPES[recipe]), images)


def test_bank_with_weights_merged_for_training_is_a_conversion_bit_for_bit() -> None:
    bank, images = banked(finish=lambda model: fold_in_training_(model, torch.zeros(2, 3, 8, 8)))
    for allocation in ALLOCATIONS.values():
        bank.use_(allocation)
        assert_same(bank.model, direct(allocation, fold=True), images)


def test_what_a_policy_decides_is_pinned_and_the_rest_is_free() -> None:
    policies = {
        "wide": Policy(kinds=["first", "last"], weight_bits=8, input_bits=FULL_PRECISION),
        "own": Policy(layers=["point"], weight=KMeans, weight_bits=5),
    }
    bank, images = banked(policies=policies)
    assert bank.pinned == {
        ("stem", "weight"): 8, ("stem", "input"): FULL_PRECISION, ("point", "weight"): 5,
        ("head", "weight"): 8, ("head", "input"): FULL_PRECISION,
    }  # fmt: skip
    assert bank.options["stem"] == (LayerBits(8, FULL_PRECISION),)
    assert bank.options["point"] == (LayerBits(5, 3), LayerBits(5, 8), LayerBits(5, FULL_PRECISION))
    for allocation in (UNIFORM, MIXED):
        bank.use_(allocation)
        assert_same(bank.model, direct(allocation, policies=policies), images)


def test_storage_adds_up_to_what_count_says() -> None:
    bank, images = banked()
    for allocation in (UNIFORM, MIXED):
        bank.use_(allocation)
        report = count(bank.model, images[:1])
        for row in report.layers:
            bits = allocation[row.name]
            assert row.weight_storage_bits == bank.storage_bits(row.name, "weight", bits.weight)
            assert row.input_storage_bits == bank.storage_bits(row.name, "input", bits.input)
    assert bank.storage_bits("point", "weight", FULL_PRECISION) == 8 * 8 * 32
    assert bank.storage_bits("point", "input", FULL_PRECISION) == 0


def test_tied_weights_have_one_quantizer_which_is_stored_and_chosen_once() -> None:
    bank, _ = banked()
    assert bank.tied["weight"] == {"mix": ("mix", "again")}
    assert bank.quantizers["mix"]["weight"][3] is bank.quantizers["again"]["weight"][3]
    assert bank.storage_bits("mix", "weight", 3) == 8 * 8 * 3 + 8 * 32
    assert [bank.storage_bits("again", "weight", bits) for bits in (3, FULL_PRECISION)] == [0, 0]
    chosen = [choice for choice in bank.choices("weight") if choice.layer in ("mix", "again")]
    assert chosen == [Choice("mix", "weight", bits) for bits in (2, 3, 8)]
    bank.put_([Choice("mix", "weight", 2)])
    quantizers = quantizers_of(bank.model)
    assert quantizers.keys() == {"mix.weight_quantizer", "again.weight_quantizer"}
    assert len(set(quantizers.values())) == 1


def test_a_single_choice_quantizes_nothing_else_whatever_is_pinned() -> None:
    policies = {"wide": Policy(kinds=["first"], weight_bits=8)}
    bank, images = banked(policies=policies, fixed={"head": LayerBits(8, 8)})
    assert set(quantizers_of(bank.model)) == {"stem.weight_quantizer", "head.weight_quantizer", "head.input_quantizer"}
    bank.put_([Choice("point", "input", 3)])
    assert set(quantizers_of(bank.model)) == {"point.input_quantizer"}
    bank.put_([])
    with torch.no_grad():
        assert torch.equal(bank.model(images), net()[0](images))


def test_readers_of_one_tensor_share_its_quantizer_as_in_a_conversion_for_a_target() -> None:
    def exposed() -> tuple[nn.Module, Tensor]:
        model, images = net()
        expose_operations(model, ["add"], images[:2])
        return model, images

    recipe = LayerPlan(weight=LSQ, input=LSQ, weight_observer=MinMax, input_observer=MinMax)
    model, images = exposed()
    found = find_layers(model, images[:2])
    operands = {name: LayerBits(FULL_PRECISION, 8) for name in found.operands}
    bank = make_bank(model, found, recipe, WIDTHS, [images], fixed=operands, share=True)
    assert bank.tied["input"] == {"depthwise": ("depthwise", "add_0.left")}
    stored = [bank.storage_bits(name, "input", 8) for name in ("depthwise", "add_0.left", "add_0.right")]
    assert stored == [32, 0, 32]
    for bits in (8, 3):
        allocation = {**dict.fromkeys(NAMES, LayerBits(3, bits)), **operands}
        other, _ = exposed()
        plans = plan_layers(found, allocation, recipe)
        swap_layers(other, found, plans)
        share_quantizers_(other, plans, readings(other, images[:2]).tensors)
        calibrate(other, [images], plans)
        bank.use_(allocation)
        assert_same(bank.model, other.eval(), images)


def test_quantizers_take_the_mode_of_their_layer() -> None:
    bank, _ = banked()
    bank.model.train()
    bank.use_(UNIFORM)
    assert all(quantizer.training for quantizer in quantizers_of(bank.model).values())
    bank.model.eval()
    bank.use_(MIXED)
    assert not any(quantizer.training for quantizer in quantizers_of(bank.model).values())


@pytest.mark.parametrize(
    ("allocation", "message"),
    [
        ({"pointt": LayerBits(3, 8)}, r"allocation: 'pointt' is not a layer that can be quantized; did you mean"),
        ({"point": LayerBits(4, 8)}, r"the weight of layer 'point' has no quantizer of 4 bits here; .* \[2, 3, 8\]"),
        ({"point": LayerBits(3, 2)}, r"the input of layer 'point' has no quantizer of 2 bits here; .* \[3, 8\]"),
        ({"stem": LayerBits(3, 8)}, r"the weight of layer 'stem' has no quantizer of 3 bits here; its widths are 32"),
    ],
)
def test_bits_that_the_bank_does_not_have_are_refused_and_nothing_changes(allocation: Any, message: str) -> None:
    bank, _ = banked(fixed={"stem": LayerBits(FULL_PRECISION, FULL_PRECISION)})
    bank.use_({"head": LayerBits(3, 3)})
    before = quantizers_of(bank.model)
    with pytest.raises(ValueError, match=message):
        bank.use_(allocation)
    assert quantizers_of(bank.model) == before


def test_width_that_a_quantizer_does_not_have_is_refused_with_the_layer() -> None:
    with pytest.raises(ValueError, match=r"layer 'stem': LSQ"):
        banked(widths=Widths((1, 8), (8,)))


def test_bank_of_one_seed_is_the_same_again() -> None:
    first, second = banked()[0], banked()[0]
    for name, roles in first.quantizers.items():
        for role, widths in roles.items():
            for bits, quantizer in widths.items():
                other: Quantizer = second.quantizers[name][role][bits]
                assert all(torch.equal(a, b) for a, b in zip(quantizer.buffers(), other.buffers(), strict=True))


def test_copy_of_a_bank_shares_nothing() -> None:
    bank, _ = banked()
    other = copy.deepcopy(bank)
    other.use_(UNIFORM)
    assert not quantizers_of(bank.model)
    assert len(quantizers_of(other.model)) == 12
