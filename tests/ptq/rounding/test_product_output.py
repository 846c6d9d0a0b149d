"""Product quantization by the output: the matrix by hand, less error than by the weight, what is left out and why."""

import copy
import logging
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qtrain.allocate.uniform import Uniform
from qtrain.convert.calibrate import calibrate
from qtrain.convert.layers import find_layers, set_quantization
from qtrain.convert.plan import LayerPlan, plan_layers
from qtrain.convert.swap import swap_layers
from qtrain.nn import QuantConv, QuantLinear
from qtrain.observers.min_max import MinMax
from qtrain.ptq.rounding.product_output import ProductOutput, block_gram
from qtrain.quantizers.codebook.product import Product
from qtrain.quantizers.uniform.lsq import LSQ
from qtrain.spec import FULL_PRECISION, QuantSpec


def student(model: nn.Module, images: Tensor, *, weight: Any = Product, input: int = FULL_PRECISION) -> nn.Module:
    found = find_layers(model, images[:1])
    recipe = LayerPlan(weight=weight, input=LSQ, weight_observer=MinMax, input_observer=MinMax)
    plans = plan_layers(found, Uniform(weight=3, input=input, first=None, last=None)(found.weighted), recipe)
    swap_layers(model, found, plans)
    calibrate(model, [images], plans)
    return model.eval()


def correlated(*shape: int) -> Tensor:
    """Images that are smooth along their width, whose neighbors are nearly equal."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).cumsum(dim=-1)


@pytest.mark.parametrize("groups", [1, 2])
def test_gram_of_a_convolution_matches_a_loop_over_patches(groups: int) -> None:
    torch.manual_seed(0)
    layer = QuantConv(source=nn.Conv2d(4, 6, (2, 3), stride=2, padding=1, groups=groups))
    x, block = torch.randn(2, 4, 5, 6), 6
    padded = torch.zeros(2, 4, 7, 8)
    padded[:, :, 1:-1, 1:-1] = x
    expected, count = torch.zeros(6, 6, dtype=torch.float64), 0
    for n in range(2):
        for channel in range(4):
            for row in range(0, 6, 2):
                for column in range(0, 6, 2):
                    patch = padded[n, channel, row : row + 2, column : column + 3].flatten().double()
                    expected, count = expected + torch.outer(patch, patch), count + 1
    torch.testing.assert_close(block_gram(layer, x, block), expected / count)


def test_gram_of_a_linear_layer_matches_a_loop_over_blocks() -> None:
    layer, x = QuantLinear(source=nn.Linear(6, 2)), torch.randn(4, 3, 6)
    blocks = [x[n, t, 2 * b : 2 * b + 2].double() for n in range(4) for t in range(3) for b in range(3)]
    torch.testing.assert_close(block_gram(layer, x, 2), sum(torch.outer(v, v) for v in blocks) / len(blocks))


def test_vectors_are_chosen_by_the_metric() -> None:
    """``(v - c)^T G (v - c)`` over all vectors, one block after the other, in float64."""
    torch.manual_seed(0)
    weight, half = torch.randn(16, 4), torch.randn(4, 4)
    gram = half @ half.T + 0.1 * torch.eye(4)
    quantizer = Product(spec=QuantSpec(bits=2, shape=(16, 4), signed=True))
    quantizer.cluster_by_(weight, gram)
    codebook, g = quantizer.codebook.detach().double(), gram.double()
    for row, code in zip(weight.double(), quantizer.quantize(weight).codes.flatten().tolist(), strict=True):
        costs = [float((row - c) @ g @ (row - c)) for c in codebook]
        assert costs[code] <= min(costs) * (1 + 1e-4) + 1e-9
    members = [weight[quantizer.indices(weight) == code] for code in range(4)]
    for code, own in enumerate(members):
        torch.testing.assert_close(codebook[code].float(), own.mean(dim=0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("input", [FULL_PRECISION, 4])
def test_outputs_are_closer_than_by_the_error_of_weights(input: int) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)]
    images = correlated(16, 3, 8, 8)
    model = student(nn.Sequential(*layers), images, input=input)
    exact = copy.deepcopy(model)
    set_quantization(exact, enabled=False)
    with torch.no_grad():
        before = float((model(images) - exact(images)).square().mean())
        ProductOutput()(model, [images], seed=0)
        assert float((model(images) - exact(images)).square().mean()) < 0.8 * before
    again = Product(spec=model[0].weight_quantizer.spec)
    again.load_state_dict(model[0].weight_quantizer.state_dict())
    assert torch.equal(again(model[0].weight), model[0].weight_quantizer(model[0].weight)), "the metric is in the state"


def test_layers_without_patches_are_left_with_a_reason(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    same = nn.Conv2d(3, 4, 3, padding="same")
    model = nn.Sequential(same, nn.ConvTranspose2d(4, 4, 2), nn.Flatten(), nn.Linear(324, 4))
    images = correlated(8, 3, 8, 8)
    model = student(model, images)
    codebook = model[0].weight_quantizer.codebook.detach().clone()
    with caplog.at_level(logging.WARNING):
        ProductOutput()(model, [images], seed=0)
    assert torch.equal(model[0].weight_quantizer.codebook, codebook)
    assert "left with the codebook by the weight: 0: its padding is 'same' and no number" in caplog.text
    assert "1: a QuantConvTranspose multiplies no patches of its input" in caplog.text


def test_students_without_codebooks_and_calls_without_images_are_refused() -> None:
    images = correlated(2, 3, 8, 8)
    model = student(nn.Sequential(nn.Conv2d(3, 4, 3)), images, weight=partial(LSQ, init="range"))
    with pytest.raises(ValueError, match="product_output clusters again what quantizer@"):
        ProductOutput()(model, [images], seed=0)
    with pytest.raises(ValueError, match="has no images to see outputs of"):
        ProductOutput()(model, [], seed=0)
