"""Statistics followed through a model: exact where they can be, and a range that real activations stay in."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtrain.convert.fold import OutputStatistics, fold_batchnorm_
from qtrain.convert.layers import find_layers, quant_layers
from qtrain.convert.operations import expose_operations
from qtrain.convert.plan import LayerPlan, plan_layers
from qtrain.convert.swap import swap_layers
from qtrain.models.factory import create_model
from qtrain.observers.min_max import MinMax
from qtrain.observers.squared_error import SquaredError
from qtrain.ptq.bn_propagation import BOUNDS, ROWS, expected, follow, standard_normal
from qtrain.ptq.calibrate_from_bn import calibrate_from_statistics
from qtrain.quantizers.uniform.affine import Affine
from qtrain.spec import LayerBits

RECIPE = LayerPlan(weight=Affine, input=Affine, weight_observer=MinMax, input_observer=MinMax)
MEAN, STD = torch.tensor([-1.5, -0.2, 0.0, 0.7, 8.0]), torch.tensor([1.0, 0.3, 2.0, 0.0, 1.5])


def converted(model: nn.Module, example: Tensor, operands: int = 0) -> dict[str, LayerPlan]:
    found = find_layers(model, example)
    bits = {name: LayerBits(8, 8) for name in found.weighted} | {
        name: LayerBits(32, operands) for name in found.operands
    }
    plans = plan_layers(found, bits, RECIPE)
    swap_layers(model, found, plans)
    return plans


def behind(activation: nn.Module) -> Tensor:
    """Values that come through ``activation`` from normals of ``MEAN`` and ``STD``, (BOUNDS + ROWS, 5)."""
    model = nn.Sequential(nn.Conv2d(3, 5, 1), activation, nn.Conv2d(5, 2, 1)).eval()
    converted(model, torch.zeros(1, 3, 4, 4))
    return follow(model, {"0": OutputStatistics(MEAN, STD)})["2"].flatten(1)


def integrated(low: float, high: float) -> Tensor:
    """Mean of normals clipped to [low, high], by numerical integration."""
    z = torch.linspace(-12, 12, 400_001, dtype=torch.float64)
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    values = (MEAN.double().unsqueeze(1) + STD.double().unsqueeze(1) * z).clamp(low, high)
    return torch.trapezoid(values * density, z, dim=1)


def test_cells_of_the_normal_keep_its_moments() -> None:
    z = standard_normal().double()
    assert abs(float(z.mean())) < 1e-7
    assert abs(float(z.square().mean()) - 1) < 1e-3
    assert bool((z.diff() > 0).all())


@pytest.mark.parametrize(
    ("activation", "low", "high"), [(nn.ReLU(), 0.0, math.inf), (nn.ReLU6(), 0.0, 6.0), (nn.Hardtanh(-1, 2), -1.0, 2.0)]
)
def test_means_of_clipped_normals_are_exact(activation: nn.Module, low: float, high: float) -> None:
    torch.testing.assert_close(expected(behind(activation)).double(), integrated(low, high), atol=2e-5, rtol=0)


def test_clipped_normal_matches_the_formula_of_the_paper() -> None:
    # gamma phi(-beta / gamma) + beta (1 - Phi(-beta / gamma)), appendix C.
    beta, gamma = MEAN[STD > 0].double(), STD[STD > 0].double()
    phi = torch.exp(-(beta / gamma).square() / 2) / math.sqrt(2 * math.pi)
    formula = gamma * phi + beta * (1 - torch.special.ndtr(-beta / gamma))
    torch.testing.assert_close(expected(behind(nn.ReLU()))[STD > 0].double(), formula, atol=2e-6, rtol=1e-6)


def test_bounds_are_beta_plus_and_minus_six_gamma() -> None:
    values = behind(nn.ReLU())
    assert values.shape == (BOUNDS + ROWS, 5)
    torch.testing.assert_close(values.amax(dim=0), (MEAN + 6 * STD).clamp(min=0))
    torch.testing.assert_close(values.amin(dim=0), (MEAN - 6 * STD).clamp(min=0))


class Block(nn.Module):
    """relu(conv1 + conv2) with a pooled gate: a sum, a product, a mean over places."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.gate, self.head = (nn.Conv2d(3, 5, 1) for _ in range(4))
        self.gate, self.head = nn.Conv2d(5, 5, 1), nn.Conv2d(5, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.one(x) + self.two(x))
        y = F.max_pool2d(y, 2)
        return self.head(y * self.gate(y.mean((2, 3), keepdim=True)).sigmoid())


def test_sum_has_the_moments_of_independent_values() -> None:
    model = Block().eval()
    other = OutputStatistics(torch.tensor([0.5, 0.0, -1.0, 1.0, 0.0]), torch.ones(5))
    converted(model, torch.zeros(1, 3, 4, 4))
    seen = follow(model, {"one": OutputStatistics(MEAN, STD), "two": other})
    total = (MEAN + other.mean).double(), (STD.square() + 1).sqrt().double()
    phi = torch.exp(-(total[0] / total[1]).square() / 2) / math.sqrt(2 * math.pi)
    formula = total[1] * phi + total[0] * torch.special.ndtr(total[0] / total[1])
    torch.testing.assert_close(expected(seen["gate"]).double(), formula, atol=5e-3, rtol=5e-3)
    high = seen["gate"].flatten(1).amax(dim=0)
    torch.testing.assert_close(high.double(), (total[0] + 6 * total[1]).clamp(min=0), atol=1e-2, rtol=1e-2)
    gated = seen["head"].flatten(1)
    assert bool((gated.amax(dim=0) <= high + 1e-6).all()) and float(gated.amin()) >= 0


def test_bounds_of_a_product_with_negative_values() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.head = nn.Conv2d(3, 1, 1), nn.Conv2d(3, 1, 1), nn.Conv2d(1, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.one(x) * self.two(x))

    model = Product().eval()
    converted(model, torch.zeros(1, 3, 4, 4))
    one, two = (
        OutputStatistics(torch.tensor([1.0]), torch.tensor([1.0])),
        OutputStatistics(torch.tensor([0.0]), torch.tensor([2.0])),
    )
    values = follow(model, {"one": one, "two": two})["head"]
    assert (float(values.amin()), float(values.amax())) == (-84.0, 84.0)  # 7 times -+12


def test_a_layer_without_statistics_sums_its_inputs_moments() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU(), nn.Conv2d(5, 4, 3, groups=1), nn.Flatten(), nn.Linear(16, 2))
    converted(model.eval(), torch.zeros(1, 3, 4, 4))
    with torch.no_grad():
        values = follow(model, {"0": OutputStatistics(MEAN, STD)})["4"].flatten(1)
        draws = (MEAN + STD * torch.randn(20_000, 5)).relu()
        taps = model[2].weight.detach()
        mean = torch.einsum("oikl,i->o", taps, draws.mean(dim=0)) + model[2].bias
        std = torch.einsum("oikl,i->o", taps.square(), draws.var(dim=0)).sqrt()
    torch.testing.assert_close(expected(values), mean, atol=0.05, rtol=0.05)
    torch.testing.assert_close(values[BOUNDS:].std(dim=0), std, atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    ("name", "fold"),
    [("cifar_resnet8", True), ("cifar_resnet8", False), ("test_efficientnet", True), ("test_byobnet", False)],
)
def test_ranges_from_statistics_cover_measured_activations(name: str, fold: bool, settle: Any) -> None:
    torch.manual_seed(0)
    model = settle(create_model(name=name, num_classes=10, in_channels=3, image_size=32), size=32, images=64)
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(1))  # others than those of the norms
    statistics = fold_batchnorm_(model, images[:1]) if fold else {}
    plans = converted(model, images[:1])
    pixels = torch.full((3,), 5.0)
    calibrate_from_statistics(model, plans, statistics, low=-pixels, high=pixels)
    seen: dict[str, Tensor] = {}
    for layer_name, layer in quant_layers(model).items():
        layer.register_forward_pre_hook(lambda _, args, n=layer_name: seen.update({n: args[0].detach()}))
    with torch.no_grad():
        for layer in quant_layers(model).values():
            layer.input_quantizer.enabled = layer.weight_quantizer.enabled = False  # type: ignore[union-attr]
        model(images)
    assert len(seen) == len(plans) > 5
    for layer_name, x in seen.items():
        quantizer = quant_layers(model)[layer_name].input_quantizer
        assert quantizer is not None and bool(quantizer.initialized)
        quantizer.enabled = True
        step = float(quantizer.scale)  # type: ignore[operator, arg-type]
        assert float(((quantizer(x) - x).abs() <= step * 0.501).float().mean()) > 0.9995, layer_name
        used = float(x.abs().max()) / (step * float(quantizer.code_high))
        assert used > 0.05, f"{layer_name}: the range is {1 / used:.0f} times too wide"


def test_folded_or_not_the_ranges_are_the_same(settle: Any) -> None:
    torch.manual_seed(0)
    model = settle(create_model(name="cifar_resnet8", num_classes=10, in_channels=3, image_size=16))
    folded = copy.deepcopy(model)
    statistics = fold_batchnorm_(folded, torch.zeros(1, 3, 16, 16))
    for m in (model, folded):
        converted(m, torch.zeros(1, 3, 16, 16))
    before, after = follow(model, {}), follow(folded, statistics)
    assert before.keys() == after.keys()
    ends = [(x.amin(), x.amax()) for name in before for x in (before[name], after[name])]
    for one, other in zip(ends[::2], ends[1::2], strict=True):
        torch.testing.assert_close(one, other, atol=1e-2, rtol=1e-3)


def test_the_first_layer_sees_pixels_and_the_second_six_deviations() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU(), nn.Conv2d(5, 2, 1)).eval()
    plans = converted(model, torch.zeros(1, 3, 4, 4))
    low, high = torch.tensor([-2.0, -2.5, -1.8]), torch.tensor([2.2, 2.4, 3.0])
    calibrate_from_statistics(model, plans, {"0": OutputStatistics(MEAN, STD)}, low=low, high=high)
    first, second = model[0].input_quantizer, model[2].input_quantizer
    assert bool(first.signed) and not bool(second.signed)
    torch.testing.assert_close(float(first.scale), 3.0 / 127, rtol=1e-5, atol=0)
    torch.testing.assert_close(float(second.scale), (8 + 6 * 1.5) / 255, rtol=1e-5, atol=0)
    assert bool(model[0].weight_quantizer.initialized)


def test_an_observer_may_choose_a_smaller_range() -> None:
    scales = {}
    for observer in (MinMax, SquaredError):
        model = nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU(), nn.Conv2d(5, 2, 1)).eval()
        found = find_layers(model, torch.zeros(1, 3, 4, 4))
        settings = LayerPlan(weight=Affine, input=Affine, weight_observer=MinMax, input_observer=observer)
        plans = plan_layers(found, dict.fromkeys(found.weighted, LayerBits(4, 4)), settings)
        swap_layers(model, found, plans)
        pixels = torch.ones(3)
        same = OutputStatistics(torch.zeros(5), torch.ones(5))
        calibrate_from_statistics(model, plans, {"0": same}, low=-pixels, high=pixels)
        scales[observer] = float(model[2].input_quantizer.scale)
    # Of a half normal in 15 steps the least squared error is at a clip of about 3; the bound is 6.
    assert scales[MinMax] == pytest.approx(6 / 15)
    assert 2.3 / 15 < scales[SquaredError] < 4 / 15


def test_exposed_sums_are_calibrated_too(settle: Any) -> None:
    torch.manual_seed(0)
    model = settle(create_model(name="cifar_resnet8", num_classes=10, in_channels=3, image_size=16))
    example = torch.zeros(1, 3, 16, 16)
    expose_operations(model, {"add"}, example)
    plans = converted(model, example, operands=8)
    calibrate_from_statistics(model, plans, {}, low=torch.full((3,), -2.0), high=torch.full((3,), 2.0))
    operands = [name for name in quant_layers(model) if name.endswith(("left", "right"))]
    assert len(operands) == 6
    for name in operands:
        assert bool(quant_layers(model)[name].input_quantizer.initialized)  # type: ignore[union-attr]


def test_model_without_statistics_is_a_one_line_error() -> None:
    pixels = torch.ones(3)
    untrained = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    without = create_model(name="test_vit", num_classes=10, in_channels=3, image_size=32)
    for model, example in ((untrained, torch.zeros(1, 3, 4, 4)), (without, torch.zeros(1, 3, 32, 32))):
        plans = converted(model, example)
        with pytest.raises(ValueError, match="has no batch norm that has seen training data"):
            calibrate_from_statistics(model, plans, {}, low=-pixels, high=pixels)


def test_operation_that_cannot_be_followed_is_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.norm, self.two = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(1, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.norm(self.one(x)).reshape(-1, 1, 4, 4))

    model = Odd().train()
    model(torch.randn(8, 3, 4, 4))
    plans = converted(model.eval(), torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match=r"cannot be followed through .* of Odd: .*; take images"):
        calibrate_from_statistics(model, plans, {}, low=-torch.ones(3), high=torch.ones(3))
    with pytest.raises(ValueError, match="deviations must be above 0, got -1"):
        calibrate_from_statistics(model, plans, {}, low=-torch.ones(3), high=torch.ones(3), deviations=-1)


def test_layer_inside_an_untraceable_module_is_named() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) if x.shape[0] > 0 else x

    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), Branching()).train()
    model(torch.randn(8, 3, 4, 4))
    plans = converted(model.eval(), torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match=r"layer '2\.inner' is inside a module that cannot be traced"):
        calibrate_from_statistics(model, plans, {}, low=-torch.ones(3), high=torch.ones(3))


def test_a_norm_of_vectors_that_is_not_folded_keeps_their_shape() -> None:
    """(rows, C) and not a map of one pixel, which a sum would spread over rows times rows."""
    torch.manual_seed(0)

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.norm, self.head = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x.flatten(1) + self.norm(self.fc(x.flatten(1))))  # type: ignore[no-any-return]

    model = Residual()
    for _ in range(20):
        model(torch.randn(64, 4) + 1)
    found = find_layers(model.eval(), torch.randn(2, 4))
    swap_layers(model, found, plan_layers(found, dict.fromkeys(found.weighted, LayerBits(8, 8)), RECIPE))
    inputs = follow(model, {})
    assert inputs["head"].shape == inputs["fc"].shape == (BOUNDS + ROWS, 4)
