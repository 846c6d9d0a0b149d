"""Cross-layer equalization: the same outputs, ranges of channels that are closer together, and what is left and why."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtrain.convert.fold import OutputStatistics, fold_batchnorm_
from qtrain.models.factory import create_model
from qtrain.ptq.absorb import absorb_high_biases_
from qtrain.ptq.channel_groups import ScaledLayer, find_channel_groups
from qtrain.ptq.equalize import CrossLayerEqualization, Ranges, spread


def uneven(*layers: nn.Module) -> None:
    """Channels of very different ranges, on both sides, in ``layers``."""
    with torch.no_grad():
        for layer in layers:
            weight: Any = layer.weight
            weight.mul_(torch.logspace(-1.5, 0.5, len(weight)).reshape(-1, *(1 for _ in weight.shape[1:])))
            if weight.shape[1] > 1:
                weight.mul_(torch.logspace(0.5, -1, weight.shape[1]).reshape(1, -1, *(1 for _ in weight.shape[2:])))


class Scene(nn.Module):
    """A model from a forward written as a function of the module and its input."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


SCENES: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, Callable[[], nn.Module]]]] = {
    "pair": (lambda m, x: m.b(m.a(x).relu()), {"a": lambda: conv(3, 8), "b": lambda: conv(8, 5)}),
    "depthwise": (
        lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x))))),
        {"a": lambda: conv(3, 8, 1), "b": lambda: conv(8, 8, groups=8), "c": lambda: conv(8, 4, 1)},
    ),
    "grouped": (
        lambda m, x: m.c(F.leaky_relu(m.b(F.leaky_relu(m.a(x), 0.1)), 0.1)),
        {"a": lambda: conv(3, 8, 1), "b": lambda: conv(8, 12, groups=4), "c": lambda: conv(12, 4, 1, groups=2)},
    ),
    "residual": (
        lambda m, x: m.c(F.relu(m.a(x) + m.b(F.relu(m.d(F.relu(m.a2(x))))))),
        {"a": lambda: conv(3, 6), "a2": lambda: conv(3, 6), "d": lambda: conv(6, 6), "b": lambda: conv(6, 6),
         "c": lambda: conv(6, 2)},
    ),
    "identity shortcut": (
        lambda m, x: m.head((y := F.relu(m.a(x))) + m.c(F.relu(m.b(y)))),
        {"a": lambda: conv(3, 6), "b": lambda: conv(6, 6), "c": lambda: conv(6, 6), "head": lambda: conv(6, 2)},
    ),
    "padded shortcut": (
        lambda m, x: m.head(F.relu(m.b(y := F.relu(m.a(x))) + F.pad(y[:, :, ::2, ::2], (0, 0, 0, 0, 1, 2)))),
        {"a": lambda: conv(3, 5), "b": lambda: conv(5, 8, stride=2), "head": lambda: conv(8, 2)},
    ),
    "flattened": (
        lambda m, x: m.b(F.max_pool2d(F.relu(m.a(x)), 4).flatten(1)),
        {"a": lambda: conv(3, 6), "b": lambda: nn.Linear(24, 4)},
    ),
    "pooled": (
        lambda m, x: m.b(m.p(F.relu(m.a(x))).mean((2, 3))),
        {"a": lambda: conv(3, 6), "p": lambda: nn.AvgPool2d(2), "b": lambda: nn.Linear(6, 4)},
    ),
    "concatenated": (
        lambda m, x: m.c(torch.cat((F.relu(m.a(x)), m.b(x) * 2.0), dim=1)[:, 1:]),
        {"a": lambda: conv(3, 4), "b": lambda: conv(3, 5), "c": lambda: conv(8, 3)},
    ),
    "gated": (
        lambda m, x: m.c((y := F.relu(m.a(x))) * m.e(F.relu(m.r(y.mean((2, 3), keepdim=True)))).sigmoid()),
        {"a": lambda: conv(3, 8), "r": lambda: conv(8, 4, 1), "e": lambda: conv(4, 8, 1), "c": lambda: conv(8, 3)},
    ),
    "slopes of each channel": (
        lambda m, x: m.b(m.p(m.a(x))),
        {"a": lambda: conv(3, 6), "p": lambda: nn.PReLU(6), "b": lambda: conv(6, 3)},
    ),
    "linear": (
        lambda m, x: m.b(F.relu(m.a(x.flatten(1)))),
        {"a": lambda: nn.Linear(192, 10), "b": lambda: nn.Linear(10, 4)},
    ),
}  # fmt: skip


def scene(name: str) -> nn.Module:
    torch.manual_seed(0)
    forward, layers = SCENES[name]
    model = Scene(forward, **{key: make() for key, make in layers.items()}).eval()
    uneven(*(layer for layer in model.children() if isinstance(layer, nn.Conv2d | nn.Linear)))
    return model


def spread_of(model: nn.Module, example: Tensor) -> float:
    return spread([Ranges(layer) for layer in find_channel_groups(model, example).layers.values()])


@pytest.mark.parametrize("name", SCENES)
def test_equalization_keeps_outputs_and_equalizes_ranges(name: str) -> None:
    model, images = scene(name), torch.randn(16, 3, 8, 8)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with torch.no_grad():
        expected, wide = model(images), spread_of(model, images)
        CrossLayerEqualization()(model, images[:1], {})
        result = model(images)
    assert float((result - expected).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))
    assert spread_of(model, images) < 0.8 * wide
    layers = [name for name, module in model.named_children() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert all(not torch.equal(before[f"{layer}.weight"], model.state_dict()[f"{layer}.weight"]) for layer in layers)


@pytest.mark.parametrize(
    ("name", "options"),
    [("cifar_resnet8", {}), ("cifar_resnet8", {"shortcut": "B"}), ("test_resnet", {}), ("test_efficientnet", {})],
    ids=["A", "B", "resnet", "efficientnet"],
)
def test_equalization_keeps_the_function_of_networks(name: str, options: dict[str, Any], settle: Any) -> None:
    torch.manual_seed(0)
    model = settle(create_model(name=name, num_classes=10, in_channels=3, image_size=32, **options), size=32, images=32)
    images = torch.randn(4, 3, 32, 32)
    statistics = fold_batchnorm_(model, images[:1])
    with torch.no_grad():
        expected, wide = model(images), spread_of(model, images)
        CrossLayerEqualization()(model, images[:1], statistics)
        assert float((model(images) - expected).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))
    assert spread_of(model, images) < wide


def test_equalization_of_a_pair_matches_equation_11() -> None:
    model = scene("pair")
    one, two = model.a.weight.detach().clone(), model.b.weight.detach().clone()
    bias = model.a.bias.detach().clone()
    r1, r2 = one.abs().amax(dim=(1, 2, 3)), two.abs().amax(dim=(0, 2, 3))
    s = (r1 / r2).sqrt()
    CrossLayerEqualization()(model, torch.zeros(1, 3, 8, 8), {})
    torch.testing.assert_close(model.a.weight.detach(), one / s.reshape(-1, 1, 1, 1), atol=0, rtol=1e-5)
    torch.testing.assert_close(model.a.bias.detach(), bias / s, atol=0, rtol=1e-5)
    torch.testing.assert_close(model.b.weight.detach(), two * s.reshape(1, -1, 1, 1), atol=0, rtol=1e-5)


def test_range_of_a_depthwise_layer_ends_between_its_neighbors() -> None:
    # All three ranges of a channel become equal, to the cube root of their product.
    model = scene("depthwise")
    sides = ((model.a, (1, 2, 3)), (model.b, (1, 2, 3)), (model.c, (0, 2, 3)))
    before = [layer.weight.detach().abs().amax(axes) for layer, axes in sides]
    CrossLayerEqualization(sweeps=200)(model, torch.zeros(1, 3, 8, 8), {})
    root = (before[0] * before[1] * before[2]) ** (1 / 3)
    for layer, axes in sides:
        torch.testing.assert_close(layer.weight.detach().abs().amax(axes), root, atol=0, rtol=0.02)


def test_statistics_follow_the_outputs() -> None:
    model, images = scene("residual"), torch.randn(64, 3, 8, 8)

    def measured() -> dict[str, OutputStatistics]:
        found: dict[str, OutputStatistics] = {}
        handles = []
        for name in ("a", "a2", "b", "d"):

            def note(_: nn.Module, __: Any, y: Tensor, name: str = name) -> None:
                rows = y.detach().transpose(0, 1).flatten(1)
                found[name] = OutputStatistics(rows.mean(dim=1), rows.std(dim=1))

            handles.append(model.get_submodule(name).register_forward_hook(note))
        with torch.no_grad():
            model(images)
        for handle in handles:
            handle.remove()
        return found

    statistics = measured()
    before = copy.deepcopy(statistics)
    CrossLayerEqualization()(model, images[:1], statistics)
    for name, now in measured().items():
        torch.testing.assert_close(statistics[name].mean, now.mean, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(statistics[name].std, now.std, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(before[name].std, now.std)


def test_channels_of_zeros_stay_finite() -> None:
    model, images = scene("pair"), torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        model.a.weight[2] = 0
        model.b.weight[:, 5] = 0
        expected = model(images)
        CrossLayerEqualization()(model, images[:1], {})
        torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-5)
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (nn.SiLU(), "it goes to SiLU, which keeps no scale"),
        (nn.ReLU6(), "it goes to ReLU6, which keeps no scale"),
        (nn.BatchNorm2d(8), "it goes to a batch norm that is not folded, which keeps no scale"),
        (nn.Sequential(nn.ReLU(), nn.ConvTranspose2d(8, 8, 3, padding=1)), "it goes to ConvTranspose2d"),
    ],
    ids=["silu", "relu6", "norm", "transposed"],
)
def test_operations_that_keep_no_factor_are_logged(
    between: nn.Module, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 8), between, conv(8, 6), nn.ReLU(), conv(6, 2)).eval()
    uneven(model[0], model[2], model[4])
    images, first = torch.randn(4, 3, 8, 8), model[0].weight.detach().clone()
    with torch.no_grad(), caplog.at_level(logging.INFO):
        expected = model(images)
        CrossLayerEqualization()(model, images[:1], {})
        torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(model[0].weight, first)  # and what is behind is equalized all the same
    assert f"not equalized: output of: 0: {reason}" in caplog.text
    assert "a channel's range is" in caplog.text


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.b(F.relu(m.a(x)) + 1.0),
        lambda m, x: m.b(F.relu(m.a(x)) * F.relu(m.a2(x))),
        lambda m, x: m.b((y := F.relu(m.a(x))) * y),
        lambda m, x: m.b(F.pad(F.relu(m.a(x)), (1, 1, 1, 1), value=1.0)),
        lambda m, x: m.b(1.0 / (1.0 + F.relu(m.a(x)))),
        lambda m, x: m.b(F.relu(m.a(x)).mean(1, keepdim=True).expand(-1, 6, -1, -1)),
        lambda m, x: m.b(F.relu(m.a(m.a0(F.relu(m.a0(x)))))),
        lambda m, x: m.b(F.max_pool2d(F.relu(m.a(x)), 2, return_indices=True)[0]),
        lambda m, x: m.b((y := F.relu(m.a(x)))[:, : y.shape[1]]),
        lambda m, x: m.b(F.pad(F.relu(m.a(x)), (0, 0, 0, 0, 0, 9 - x.shape[1] - 6))),
    ],
    ids="constant,product,square,ones around,reciprocal,over channels,called twice,pair,slice,padding".split(","),
)
def test_channels_whose_scaling_would_change_the_function_are_left(forward: Callable[[Any, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model = Scene(forward, a0=conv(3, 3), a=conv(3, 6), a2=conv(3, 6), b=conv(6, 6), c=conv(6, 2)).eval()
    whole = Scene(lambda m, x: m.inner.c(F.relu(m.inner(x))), inner=model)
    uneven(model.a, model.b, model.c)
    images = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        expected = whole(images)
        CrossLayerEqualization()(whole, images[:1], {})
        assert float((whole(images) - expected).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))


def test_relu6_may_become_relu() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 8), nn.ReLU6(), conv(8, 2))
    uneven(model[0], model[2])
    images = torch.randn(4, 3, 8, 8)
    with pytest.raises(ValueError, match=r"quantize.equalize: no channel of Sequential can be scaled .* replace_relu6"):
        CrossLayerEqualization()(model, images[:1], {})
    with torch.no_grad():
        expected = model[2](model[0](images).relu())
        CrossLayerEqualization(replace_relu6=True)(model, images[:1], {})
        assert type(model[1]) is nn.ReLU
        torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-5)


def absorbing(*, padding: int) -> tuple[nn.Module, dict[str, OutputStatistics], Tensor]:
    """Inputs whose first layer's outputs are normal, two channels of four far above zero."""
    torch.manual_seed(0)
    first, behind = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 3, 3, padding=padding, bias=False)
    mean, std = torch.tensor([9.0, 0.5, 5.0, -1.0]), torch.tensor([1.0, 1.0, 0.5, 2.0])
    with torch.no_grad():
        first.weight.copy_(torch.diag(std).reshape(4, 4, 1, 1))
        first.bias.copy_(mean)
    model = nn.Sequential(first, nn.ReLU(), behind)
    return model, {"0": OutputStatistics(mean, std)}, torch.randn(8, 4, 8, 8).clamp(-2.9, 2.9)


def test_high_biases_are_absorbed_into_the_next_layer() -> None:
    model, statistics, images = absorbing(padding=0)
    with torch.no_grad():
        expected, high = model(images), float(model[:2](images).max())
        CrossLayerEqualization(absorb=True)(model, images[:1], statistics)
        torch.testing.assert_close(model(images), expected, atol=1e-4, rtol=1e-4)  # no value is below -3 deviations
    scaled = statistics["0"]
    torch.testing.assert_close((scaled.mean - 3 * scaled.std).clamp(min=0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(model[0].bias.detach(), scaled.mean, atol=1e-5, rtol=1e-5)
    assert model[2].bias is not None and high > 11


def test_high_biases_before_zero_padding_are_not_absorbed(caplog: pytest.LogCaptureFixture) -> None:
    model, statistics, images = absorbing(padding=1)
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        expected = model(images)
        CrossLayerEqualization(absorb=True)(model, images[:1], statistics)
        torch.testing.assert_close(model(images), expected, atol=1e-4, rtol=1e-4)
    assert "high bias is not absorbed: 0: the layer behind its ReLU pads with zeros" in caplog.text


def test_model_without_scalable_channels_is_a_one_line_error() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(2), nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4))
    with pytest.raises(ValueError, match=r"quantize\.equalize: no channel of Sequential can be scaled"):
        CrossLayerEqualization()(model, torch.zeros(1, 3, 8, 8), {})


def test_sweeps_are_checked() -> None:
    with pytest.raises(ValueError, match="CrossLayerEqualization: sweeps must be at least 1, got 0"):
        CrossLayerEqualization(sweeps=0)


def tied(part: str) -> nn.Module:
    """Four convolutions; the first two share their weight or their bias, or a forward uses a weight by itself."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.b(F.relu(m.a(x))))
        y = F.conv2d(y, m.a.weight, padding=1) if part == "functional" else y
        return m.d(F.relu(m.c(F.relu(y))))

    torch.manual_seed(0)
    model = Scene(forward, a=conv(6, 6), b=conv(6, 6), c=conv(6, 6), d=conv(6, 2)).eval()
    uneven(model.a, model.b, model.c, model.d)
    match part:
        case "weight":
            model.b.weight = model.a.weight
        case "bias":
            model.b.bias = model.a.bias
        case "memory":
            model.b.weight = nn.Parameter(model.a.weight.data)
    return model


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ("weight", "output of: a: its weight is also b.weight, which would change with it"),
        ("memory", "output of: a: its weight is also b.weight, which would change with it"),
        ("bias", "output of: a: its bias is also b.bias, which would change with it"),
        ("functional", "output of: a: its weight is also used outside of the layer"),
    ],
)
def test_shared_weights_and_biases_are_not_equalized(part: str, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    model, images = tied(part), torch.randn(4, 6, 8, 8)
    before = model.a.weight.detach().clone()
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        expected = model(images)
        CrossLayerEqualization()(model, images[:1], {})
        torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(model.a.weight, before)  # and the layers behind are equalized all the same
    assert reason in caplog.text


def test_equalization_that_changes_the_output_is_refused() -> None:
    """A module that cannot be traced reads the weight of a layer, so that nothing but the output shows it."""

    class Hidden(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layers = [layer]

        def forward(self, x: Tensor) -> Tensor:
            return x * self.layers[0].weight.abs().sum() if x.shape[0] > 0 else x

    model = Scene(lambda m, x: m.h(m.b(F.relu(m.a(x)))), a=conv(3, 6), b=conv(6, 2))
    model.h = Hidden(model.a)
    uneven(model.a, model.b)
    with pytest.raises(ValueError, match=r"quantize.equalize: Scene computes something else .* quantize.equalize=none"):
        CrossLayerEqualization()(model, torch.randn(1, 3, 8, 8), {})


def test_high_bias_that_is_shared_is_not_absorbed(caplog: pytest.LogCaptureFixture) -> None:
    model, statistics, images = absorbing(padding=0)
    model.append(nn.ReLU())
    model.append(nn.Conv2d(3, 4, 1))
    model[4].bias = model[0].bias
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        expected = model(images)
        absorb_high_biases_(model, statistics)
        assert torch.equal(model(images), expected)
    assert "high bias is not absorbed: 0: its bias is also 4.bias, which would change with it" in caplog.text


@pytest.mark.parametrize(("inputs", "outputs", "groups"), [(8, 12, 4), (12, 8, 2), (6, 6, 3), (4, 8, 4), (5, 7, 1)])
def test_ranges_of_grouped_layers_match_a_loop_over_all_weights(inputs: int, outputs: int, groups: int) -> None:
    """Output ``o`` of group ``g`` reads the inputs ``g I / groups ...``; factors differ for each channel."""
    torch.manual_seed(0)
    layer = nn.Conv2d(inputs, outputs, 3, groups=groups)
    uneven(layer)
    ranges = Ranges(ScaledLayer(layer, torch.arange(inputs), inputs + torch.arange(outputs)))
    factors = torch.rand(inputs + outputs) + 0.5
    by_output, by_input = torch.zeros(outputs), torch.zeros(inputs)
    scaled = torch.zeros(outputs, inputs // groups)
    for o in range(outputs):
        for i in range(inputs // groups):
            channel = (o * groups // outputs) * (inputs // groups) + i
            largest = layer.weight.detach()[o, i].abs().max()
            by_output[o], by_input[channel] = max(by_output[o], largest), max(by_input[channel], largest)
            scaled[o, i] = largest * factors[channel] / factors[inputs + o]
    torch.testing.assert_close(ranges.by_output(), by_output)
    torch.testing.assert_close(ranges.by_input(), by_input)
    ranges.apply_(factors)
    torch.testing.assert_close(ranges.table, scaled)
