"""Rounding that is learned: never worse than nearest, close to the best of all ways, the same each time."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qtrain
from qtrain.allocate.uniform import Uniform
from qtrain.convert.calibrate import calibrate
from qtrain.convert.layers import find_layers, quant_layers, set_quantization
from qtrain.convert.plan import LayerPlan, plan_layers
from qtrain.convert.swap import swap_layers
from qtrain.models.factory import create_model
from qtrain.observers.min_max import MinMax
from qtrain.ptq.rounding.adaround import AdaRound
from qtrain.ptq.rounding.base import Rounding, all_candidates
from qtrain.ptq.rounding.brecq import BRECQ
from qtrain.ptq.rounding.learn import learn_rounding_, squared_gradients
from qtrain.ptq.rounding.qdrop import QDrop
from qtrain.ptq.rounding.reconstruction_units import blocks_of, layers_of
from qtrain.ptq.rounding.squant import SQuant
from qtrain.quantizers.uniform.affine import Affine
from qtrain.quantizers.uniform.lsq import LSQ
from qtrain.spec import PerChannel
from qtrain.storage.affine import AffineTensor

RECIPE = AdaRound(iterations=60, batch_size=8)
LAST = ["layer3.0.conv1", "layer3.0.conv2", "linear"]
"""The layers of a small ResNet that no block of the first two stages holds."""
WAYS: dict[str, type[AdaRound] | type[BRECQ] | type[QDrop]] = {"adaround": AdaRound, "brecq": BRECQ, "qdrop": QDrop}


def student(model: nn.Module, images: Sequence[Tensor], *, bits: int = 3, input: Any = None) -> nn.Module:
    """``model`` converted to ``bits`` and calibrated."""
    found = find_layers(model, images[0])
    settings = LayerPlan(
        weight=partial(LSQ, granularity=PerChannel(0), init="range"),
        input=input or partial(LSQ, init="range"),
        weight_observer=MinMax,
        input_observer=MinMax,
    )
    plans = plan_layers(found, Uniform(weight=bits, input=bits)(found.weighted), settings)
    swap_layers(model, found, plans)
    calibrate(model, images, plans)
    return model.eval()


def resnet(**options: Any) -> tuple[nn.Module, list[Tensor]]:
    model, images = made_resnet(**options)
    return copy.deepcopy(model), images


@lru_cache
def made_resnet(**options: Any) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    model = create_model(name="cifar_resnet8", num_classes=10, in_channels=3, image_size=8, width=0.25)
    images = [torch.randn(4, 3, 8, 8) for _ in range(3)]
    return student(model, images, **options), images


def two_layers(bits: int = 2) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2))
    images = [torch.randn(16, 5) @ torch.randn(5, 5) for _ in range(2)]
    return student(model, images, bits=bits), images


@torch.no_grad()
def outputs(model: nn.Module, name: str, images: Sequence[Tensor]) -> Tensor:
    found: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda _, args, output: found.append(output.clone()))
    for batch in images:
        model(batch)
    handle.remove()
    return torch.cat(found)


def full_precision(model: nn.Module) -> nn.Module:
    exact = copy.deepcopy(model)
    set_quantization(exact, enabled=False)
    return exact


@pytest.mark.parametrize("drop", [0.0, 0.5])
@pytest.mark.parametrize("parts", [layers_of, blocks_of])
def test_learned_rounding_is_never_worse_than_nearest_on_the_reconstruction_loss(parts: Any, drop: float) -> None:
    """Measured anew by plain forwards of whole models, part after part, with nothing of the engine."""
    model, images = resnet()
    exact = full_precision(model)
    learned = copy.deepcopy(model)
    settings = QDrop(iterations=10, batch_size=8, drop=drop, input_rate=0.01)
    results = learn_rounding_(learned, parts(learned), images, settings=settings, seed=0)
    assert [result.name for result in results] == parts(model)
    before = copy.deepcopy(model)
    for result in results:
        target = outputs(exact, result.name, images)
        nearest = F.mse_loss(outputs(before, result.name, images), target)
        before.get_submodule(result.name).load_state_dict(learned.get_submodule(result.name).state_dict())
        now = F.mse_loss(outputs(before, result.name, images), target)
        assert float(nearest) == pytest.approx(result.nearest, rel=1e-4)
        assert float(now) == pytest.approx(min(result.nearest, result.learned), rel=1e-4)
        assert now <= nearest
    assert sum(result.kept for result in results) >= len(results) - 2, "and as a rule better"


def test_learned_rounding_is_close_to_the_best_of_all_roundings() -> None:
    """A layer with 2 x 6 weights: each output's 2^6 ways are tried, on the asymmetric target with correlated inputs."""
    model, images = two_layers()
    learned = copy.deepcopy(model)
    learn_rounding_(learned, ["2"], images, settings=replace(RECIPE, iterations=150), seed=0)
    target = outputs(full_precision(model), "2", images)
    chosen = all_candidates(model)["2"]

    def error(weight: Tensor) -> Tensor:
        trial = copy.deepcopy(model)
        trial[2].weight.data = weight
        return (outputs(trial, "2", images) - target).square().mean(dim=0)

    nearest = error(chosen.nearest)
    best = nearest
    for choice in itertools.product([False, True], repeat=6):
        best = torch.minimum(best, error(torch.where(torch.tensor(choice), chosen.up, chosen.down)))
    reached = (outputs(learned, "2", images) - target).square().mean(dim=0)
    assert best.sum() < 0.8 * nearest.sum(), "nearest is far from the best here"
    assert reached.sum() <= best.sum() + 0.1 * (nearest.sum() - best.sum())


def test_learned_weights_are_on_the_grid_and_next_to_the_weight() -> None:
    model, images = resnet()
    learned = copy.deepcopy(model)
    learn_rounding_(learned, layers_of(learned), images, settings=replace(RECIPE, iterations=20), seed=0)
    moved = 0
    for name, chosen in all_candidates(model).items():
        layer = quant_layers(learned)[name]
        weight, quantizer = layer.weight.detach(), layer.weight_quantizer
        assert quantizer is not None
        stored = quantizer.quantize(weight)
        assert isinstance(stored, AffineTensor)
        assert torch.equal(stored.dequantize(), quantizer(weight))
        assert ((quantizer(weight) == chosen.down) | (quantizer(weight) == chosen.up)).all()
        moved += int((quantizer(weight) != chosen.nearest).sum())
    assert moved > 50


def test_part_that_gets_worse_keeps_nearest_rounding_and_input_quantizers() -> None:
    """One step with absurd rates takes every weight to the other side, and inputs to nothing."""
    model, images = two_layers(bits=6)
    before = copy.deepcopy(model.state_dict())
    settings = BRECQ(iterations=1, batch_size=8, rate=1e4, input_rate=100.0)
    results = learn_rounding_(model, ["0", "2"], images, settings=settings, seed=0)
    assert [result.kept for result in results] == [False, False]
    assert all(result.learned > result.nearest for result in results)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("way", WAYS)
def test_learned_rounding_depends_on_the_seed_alone(way: str) -> None:
    results = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        model, images = resnet()
        torch.manual_seed(noise)
        rounding: Rounding = WAYS[way](iterations=3, batch_size=4)
        rounding(model, images, seed=seed)
        results.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_layers_are_reconstructed_from_inputs_of_the_quantized_model() -> None:
    """The paper's asymmetric reconstruction: the second layer's own error is measured behind the rounded first one."""
    model, images = two_layers()
    learned = copy.deepcopy(model)
    first, second = learn_rounding_(learned, ["2", "0"], images, settings=RECIPE, seed=0)
    assert (first.name, second.name) == ("0", "2"), "in the order of the forward"
    halfway = copy.deepcopy(model)
    halfway[0].load_state_dict(learned[0].state_dict())
    target = outputs(full_precision(model), "2", images)
    assert float(F.mse_loss(outputs(halfway, "2", images), target)) == pytest.approx(second.nearest, rel=1e-5)
    assert float(F.mse_loss(outputs(model, "2", images), target)) != pytest.approx(second.nearest, rel=1e-2)


def test_only_block_reconstruction_learns_input_quantizers() -> None:
    for way, learns in (("adaround", False), ("brecq", True), ("qdrop", True)):
        model, images = resnet()
        layer = quant_layers(model)["layer2.0.conv2"]
        assert layer.input_quantizer is not None
        before = layer.input_quantizer.scale.detach().clone()
        WAYS[way](iterations=4, batch_size=4)(model, images, seed=0)
        assert bool(layer.input_quantizer.scale != before) == learns
        assert all(p.grad is None for p in model.parameters())
        assert all(isinstance(q.input_quantizer, LSQ) for q in quant_layers(model).values()), "nothing stands in"
    fixed, images = resnet(input=Affine)
    BRECQ(iterations=2)(fixed, images, seed=0)


@pytest.mark.parametrize("way", WAYS)
def test_a_sum_that_shares_its_inputs_quantizer_is_learned_with_its_block(way: str) -> None:
    _, images = made_resnet()
    network = create_model(name="cifar_resnet8", num_classes=10, image_size=images[0].shape[-1]).eval()
    rounding = f"rounding@quantize.rounding={way}"
    model = qtrain.quantize(
        network, torch.cat(images), weight_bits=3, input_bits=8, target="onnxruntime",
        options=[rounding, "quantize.rounding.iterations=4", "quantize.rounding.batch_size=4"],
    )  # fmt: skip
    readers = quant_layers(model.get_submodule("layer1.0"))
    quantizers = [reader.input_quantizer for reader in readers.values()]
    assert len({id(quantizer) for quantizer in quantizers}) < len(quantizers), (
        "a convolution and the sum read one tensor"
    )
    assert torch.isfinite(model(images[0])).all()


def test_squared_gradients_are_those_of_the_models_own_classes() -> None:
    """Over many draws the mean is the sum over classes of ``p_k g_k^2``; here each draw is of one image."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x = torch.randn(1, 4)
    drawn = squared_gradients(model, "1", [x.repeat(4000, 1)], seed=0)
    assert drawn.shape == (4000, 5)
    assert float(drawn.mean()) == pytest.approx(1, abs=1e-4)
    hidden = model[1](model[0](x)).detach().requires_grad_()
    chances = model[2](hidden).log_softmax(dim=1)[0]
    gradients = [torch.autograd.grad(chance, hidden, retain_graph=True)[0][0] for chance in chances]
    expected = sum(c.exp().detach() * g.square() for c, g in zip(chances, gradients, strict=True))
    assert isinstance(expected, Tensor)
    torch.testing.assert_close(drawn.mean(dim=0), expected / expected.mean(), rtol=0.05, atol=0.02)


def test_outputs_with_larger_fisher_weight_are_reconstructed_better() -> None:
    """With Fisher's weights, the error that is compared and reported is the weighted one."""
    model, images = two_layers()
    exact = full_precision(model)
    settings = BRECQ(iterations=1, batch_size=8, input_rate=0.0, fisher=True)
    (result,) = learn_rounding_(model, ["2"], images, settings=settings, seed=5)
    plain, _ = two_layers()
    square = (outputs(plain, "2", images) - outputs(exact, "2", images)).square()
    assert result.nearest != pytest.approx(float(square.mean()), rel=1e-3)


def test_parts_that_cannot_be_learned_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    model, images = two_layers()
    with caplog.at_level(logging.INFO, logger="qtrain.ptq.rounding"):
        learn_rounding_(model, ["0", "1", "2"], images, settings=replace(RECIPE, iterations=2), seed=0)
        assert [record.message.split(":")[0] for record in caplog.records] == ["0", "2"], "a ReLU has nothing to round"
        caplog.clear()
        AdaRound(iterations=1)(nn.Sequential(model, Unused(model[0])), images, seed=0)
    assert "left at nearest rounding: 1.layer: a forward never calls it" in caplog.text


class Unused(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = copy.deepcopy(layer)

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_wrong_options_and_missing_images_are_refused() -> None:
    for options, message in (
        ({"iterations": 0}, "QDrop: iterations must be at least 1, got 0"),
        ({"batch_size": 0}, "QDrop: batch_size must be at least 1, got 0"),
        ({"rate": 0.0}, "QDrop: rate must be above 0, got 0.0"),
        ({"strength": -1.0}, "QDrop: strength must be at least 0, got -1.0"),
        ({"input_rate": -1.0}, "QDrop: input_rate must be at least 0, got -1.0"),
        ({"drop": 1.0}, r"QDrop: drop must be in \[0, 1\), got 1.0"),
        ({"warmup": 1.0}, r"QDrop: warmup must be in \[0, 1\), got 1.0"),
        ({"beta_start": 1.0}, "got 1.0 and 2.0"),
    ):
        with pytest.raises(ValueError, match=message):
            QDrop(**options)
    with pytest.raises(ValueError, match="rounding: has no images"):
        AdaRound()(resnet()[0], [], seed=0)


class Block(nn.Module):
    """One or two layers with a ReLU between."""

    def __init__(self, layer: nn.Module, behind: nn.Module | None = None) -> None:
        super().__init__()
        self.layer, self.behind = layer, nn.Identity() if behind is None else behind

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(F.relu(self.layer(x)))


@pytest.mark.parametrize("way", [*WAYS, "squant"])
def test_a_shared_weight_stays_at_nearest_rounding(way: str, caplog: pytest.LogCaptureFixture) -> None:
    """What rounds one of its layers well would round the other one badly, even where it is called in the same block."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(nn.Linear(6, 6)) for _ in range(3)))
    model[1].layer.weight = model[0].layer.weight
    images = [torch.randn(16, 6) @ torch.randn(6, 6)]
    model = student(model, images, bits=2)
    weights = [block.layer.weight.detach().clone() for block in model]
    rounding = SQuant() if way == "squant" else WAYS[way](iterations=100, batch_size=16)
    with caplog.at_level(logging.WARNING):
        rounding(model, images, seed=0)
    kept = [torch.equal(block.layer.weight, weight) for block, weight in zip(model, weights, strict=True)]
    assert kept == [True, True, False]
    assert "left at nearest rounding: 0.layer: its weight is also 1.layer.weight, which would change" in caplog.text


class Reused(nn.Module):
    """A layer whose weight is multiplied once more without calling it, then another one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.behind = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(F.linear(F.relu(self.layer(x)), self.layer.weight))


@pytest.mark.parametrize("way", [*WAYS, "squant"])
def test_a_weight_that_is_also_multiplied_directly_is_not_rounded(way: str) -> None:
    torch.manual_seed(0)
    model, images = nn.Sequential(Reused(), Block(nn.Linear(6, 6))), [torch.randn(16, 6) @ torch.randn(6, 6)]
    model = student(model, images, bits=2)
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    rounding = SQuant() if way == "squant" else WAYS[way](iterations=100, batch_size=16)
    rounding(model, images, seed=0)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, weights[name])}
    assert "0.layer.weight" not in changed and "0.behind.weight" in changed


def test_a_module_of_two_blocks_is_not_rounded_for_one_of_them(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    shared = nn.Linear(6, 6)
    model = nn.Sequential(*(Block(shared, nn.Linear(6, 6)) for _ in range(2)))
    images = [torch.randn(16, 6) @ torch.randn(6, 6)]
    model = student(model, images, bits=2)
    before = {name: tensor.clone() for name, tensor in model[0].layer.state_dict().items()}
    own = model[0].behind.weight.detach().clone()
    with caplog.at_level(logging.WARNING):
        BRECQ(iterations=100, batch_size=16, input_rate=0.1)(model, images, seed=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model[0].layer.state_dict().items())
    assert not torch.equal(model[0].behind.weight, own)
    assert "left at nearest rounding: 0.layer: it is also 1.layer, outside of the part 0" in caplog.text


@pytest.mark.parametrize("way", ["brecq", "qdrop"])
def test_block_reconstruction_takes_blocks_and_refuses_patterns_that_match_none(way: str) -> None:
    """A residual network's blocks are its residual blocks, and its first and last layer by themselves."""
    model, images = resnet()
    blocks = ["conv1", "layer1.0", "layer2.0", "layer3.0", "linear"]
    assert WAYS[way]().parts(model) == blocks != AdaRound().parts(model)
    assert WAYS[way](blocks=["layer[12]*"]).parts(model) == ["conv1", "layer1", "layer2", *LAST]
    with pytest.raises(ValueError, match=r"blocks: pattern .layer4\.\*. matches no part with quantized layers"):
        WAYS[way](blocks=["layer4.*"])(model, images, seed=0)


class Activated(nn.Module):
    """A block that begins with an activation, which may work in place on what the block is given."""

    def __init__(self, *, inplace: bool) -> None:
        super().__init__()
        self.act, self.conv = nn.SiLU(inplace=inplace), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.act(x))  # type: ignore[no-any-return]


def test_a_block_that_works_in_place_learns_what_one_that_does_not_learns() -> None:
    errors = []
    for inplace in (False, True):
        torch.manual_seed(0)
        blocks = nn.Sequential(Activated(inplace=inplace), Activated(inplace=inplace))
        model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), blocks, nn.Flatten(), nn.Linear(256, 5))
        images = [torch.randn(8, 3, 8, 8) for _ in range(2)]
        settings = BRECQ(iterations=20, batch_size=8)
        made = student(model, images)
        errors.append(learn_rounding_(made, blocks_of(made), images, settings=settings, seed=0))
    assert errors[0] == errors[1]


class Branches(nn.Module):
    """Two convolutions that read one tensor, and so may have one quantizer for it."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.left(x) + self.right(x)).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("way", ["brecq", "qdrop"])
def test_the_quantizer_of_another_part_stays_as_it_is(way: str) -> None:
    torch.manual_seed(0)
    images = [torch.randn(8, 3, 8, 8) for _ in range(2)]
    model = student(Branches(), images)
    model.right.input_quantizer = model.left.input_quantizer
    before = model.left.input_quantizer.scale.clone()
    learn_rounding_(model, ["left"], images, settings=WAYS[way](iterations=20, batch_size=8, input_rate=0.05), seed=0)
    assert torch.equal(model.left.input_quantizer.scale, before)


class Half(nn.Module):
    """A block with a convolution that whoever holds the block calls."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.others = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.own(x)  # type: ignore[no-any-return]


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = nn.Conv2d(3, 4, 3), nn.ModuleList([Half(), Half()]), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block.others(block(x))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("way", ["brecq", "qdrop"])
def test_a_layer_that_its_block_does_not_call_keeps_nearest_rounding(way: str) -> None:
    torch.manual_seed(0)
    images = [torch.randn(8, 3, 8, 8)]
    model = student(Holder(), images)
    nearest = all_candidates(model)["blocks.0.others"].nearest
    settings = WAYS[way](iterations=20, batch_size=8)
    results = learn_rounding_(model, blocks_of(model), images, settings=settings, seed=0)
    assert any(result.kept for result in results if result.name.startswith("blocks"))
    torch.testing.assert_close(model.get_submodule("blocks.0.others").weight, nearest)


def test_fishers_weights_need_logits_and_are_zero_where_nothing_reaches_them() -> None:
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.aside, self.head = nn.Linear(4, 3), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            self.last = self.aside(x.detach()).detach()
            return self.head(x)  # type: ignore[no-any-return]

    square = squared_gradients(Aside(), "aside", [torch.randn(6, 4)], seed=0)
    assert torch.equal(square, torch.zeros(6, 3))
    with pytest.raises(ValueError, match=r"fisher: needs outputs \(N, classes\) of the model; take fisher=false"):
        squared_gradients(nn.Sequential(nn.Conv2d(3, 5, 1)), "0", [torch.randn(2, 3, 8, 8)], seed=0)
