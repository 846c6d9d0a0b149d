"""Levels that are powers of two, and sums of them: the tables by hand, rounding by search, gradients as printed."""

from __future__ import annotations

import itertools
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qtrain.functional.levels import mirrored, powers_of_two, sums_of_powers
from qtrain.observers.min_max import MinMax
from qtrain.quantizers.codebook.apot import APoT, _say_once, looks_trained
from qtrain.quantizers.codebook.levels import LevelQuantizer
from qtrain.quantizers.codebook.power_of_two import PowerOfTwo
from qtrain.spec import PerChannel, PerTensor, QuantSpec

SHAPE = (8, 3, 3, 3)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weight_spec(bits: int = 4) -> QuantSpec:
    return QuantSpec(bits=bits, shape=SHAPE, signed=True)


def calibrate(quantizer: LevelQuantizer, x: Tensor) -> None:
    observer = MinMax(granularity=quantizer.granularity)
    observer.update(x)
    quantizer.calibrate_(observer.observed(4)._replace(tensor=x if quantizer.spec.is_weight else None))


def nearest_by_search(x: Tensor, scale: float, levels: list[float]) -> Tensor:
    """The closest of all levels, tried one by one in float64."""
    values = [min((level * scale for level in levels), key=lambda v: abs(v - e)) for e in x.double().flatten().tolist()]
    return torch.tensor(values, dtype=torch.float64).reshape(x.shape)


def test_apot_levels_match_the_paper() -> None:
    """§2.2: 4 bits are {0, 2^0, 2^-2, 2^-4} + {0, 2^-1, 2^-3, 2^-5}; 3 bits {0, 2^0, 2^-1, 2^-3} + {0, 2^-2}."""
    four = {a + b for a, b in itertools.product([0, 1, 1 / 4, 1 / 16], [0, 1 / 2, 1 / 8, 1 / 32])}
    assert sums_of_powers(4) == [level / 1.5 for level in sorted(four)]
    three = {a + b for a, b in itertools.product([0, 1, 1 / 2, 1 / 8], [0, 1 / 4])}
    assert sums_of_powers(3) == [level / 1.25 for level in sorted(three)]
    assert sums_of_powers(2) == [0, 1 / 4, 1 / 2, 1]
    five = {a + b + c for a, b, c in itertools.product([0, 1, 1 / 4, 1 / 32], [0, 1 / 2, 1 / 8, 1 / 64], [0, 1 / 16])}
    assert sums_of_powers(5) == [level / (1.5 + 1 / 16) for level in sorted(five)]


@pytest.mark.parametrize("magnitudes", [powers_of_two, sums_of_powers])
@pytest.mark.parametrize("bits", range(1, 8))
def test_every_code_has_a_different_level(magnitudes: object, bits: int) -> None:
    levels = magnitudes(bits)  # type: ignore[operator]
    assert len(set(levels)) == 2**bits
    assert (levels[0], levels[-1]) == (0.0, 1.0)
    assert len(set(mirrored(levels))) == 2 ** (bits + 1) - 1


def test_three_signed_bits_of_powers() -> None:
    quantizer = PowerOfTwo(spec=weight_spec(3))
    assert quantizer.levels()[:7].tolist() == [-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0]
    # Nearest in the linear domain: 0.74 is closer to 0.5, in the logarithmic domain it would be closer to 1.
    x = torch.tensor([0.74, 0.76, -0.37, 0.1, 3.0])
    assert quantizer(x).tolist() == [0.5, 1.0, -0.25, 0.0, 1.0]
    assert quantizer.quantize(x).codes.tolist() == [5, 6, 2, 3, 6]


@pytest.mark.parametrize("kind", [PowerOfTwo, APoT])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_values_are_the_nearest_levels(kind: type[PowerOfTwo] | type[APoT], signed: bool, bits: int) -> None:
    quantizer = kind(spec=QuantSpec(bits=bits, signed=signed))
    quantizer.scale.data.fill_(1.7)
    magnitudes = (powers_of_two if kind is PowerOfTwo else sums_of_powers)(bits - signed)
    x = noise(200) * 2
    expected = nearest_by_search(x, 1.7, mirrored(magnitudes) if signed else magnitudes)
    torch.testing.assert_close(quantizer(x).double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0)])
def test_gradients_match_the_reparameterized_clipping(granularity: PerTensor | PerChannel) -> None:
    """Equation 8: d/da is sign(x) beyond a and q - x/a within, d/dx is 0 and 1; in float64 by hand."""
    quantizer = APoT(spec=weight_spec(), granularity=granularity, normalize=False)
    quantizer.scale.data.fill_(0.9)
    x, upstream = noise(*SHAPE).requires_grad_(), noise(*SHAPE, seed=1)
    to_x, to_clip = torch.autograd.grad(quantizer(x), [x, quantizer.scale], upstream)
    t = x.detach().double() / quantizer.scale.detach().double()
    inside = t.abs() <= 1
    projected = nearest_by_search(t.clamp(-1, 1), 1.0, mirrored(sums_of_powers(3)))
    each = torch.where(inside, projected - t, t.sign()) * upstream.double()
    expected = each.sum() if isinstance(granularity, PerTensor) else each.sum((1, 2, 3), keepdim=True)
    torch.testing.assert_close(to_clip.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(to_x, upstream * inside)


def test_zeros_after_relu_get_the_whole_gradient() -> None:
    """Equation 8 has |x| <= a: the ends are inside."""
    quantizer = APoT(spec=QuantSpec(bits=4, signed=False))
    x = torch.tensor([-0.5, 0.0, 0.5, 1.0, 1.5], requires_grad=True)
    to_x, to_clip = torch.autograd.grad(quantizer(x).sum(), [x, quantizer.scale])
    assert to_x.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]
    levels = torch.tensor(sums_of_powers(4))
    torch.testing.assert_close(to_clip, 1 + levels[(levels - 0.5).abs().argmin()] - 0.5)


def test_normalized_weights_have_mean_zero_and_deviation_one() -> None:
    weight = noise(*SHAPE) * 0.03 + 0.01
    plain, back = (APoT(spec=weight_spec(), normalize=True, rescale=rescale) for rescale in (False, True))
    for quantizer in (plain, back):
        calibrate(quantizer, weight)
    w = weight.double()
    normal = (w - w.mean()) / (w.std(correction=0) + 1e-5)
    expected = nearest_by_search(normal, plain.scale.item(), mirrored(sums_of_powers(3)))
    torch.testing.assert_close(plain(weight).double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(plain.scale, back.scale)
    torch.testing.assert_close(back(weight).double(), expected * (w.std(correction=0) + 1e-5), rtol=1e-4, atol=1e-7)


def test_the_gradient_passes_through_mean_and_deviation() -> None:
    """Where nothing is clipped the surrogate is smooth: its derivative by finite differences, in float64."""
    quantizer = APoT(spec=QuantSpec(bits=4, shape=(6,), signed=True), normalize=True)
    quantizer.scale.data.fill_(10.0)
    weight, upstream = noise(6), noise(6, seed=1)
    leaf = weight.clone().requires_grad_()
    (grad,) = torch.autograd.grad(quantizer(leaf), leaf, upstream)

    def smooth(w: Tensor) -> float:
        return float(((w - w.mean()) / (w.std(correction=0) + 1e-5) * upstream.double()).sum())

    step = 1e-6 * torch.eye(6, dtype=torch.float64)
    differences = [(smooth(weight.double() + e) - smooth(weight.double() - e)) / 2e-6 for e in step]
    torch.testing.assert_close(grad.double(), torch.tensor(differences, dtype=torch.float64), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [PowerOfTwo, APoT])
def test_weights_start_at_the_least_squared_error(kind: type[PowerOfTwo] | type[APoT]) -> None:
    weight = noise(*SHAPE)
    quantizer = kind(spec=weight_spec(), **({"normalize": False} if kind is APoT else {}))
    calibrate(quantizer, weight)

    def error(scale: float) -> float:
        quantizer.scale.data.fill_(scale)
        return (quantizer(weight) - weight).square().sum().item()

    start = quantizer.scale.item()
    grid = [float(weight.abs().max()) * k / 1000 for k in range(1, 1001)]
    assert error(start) <= 1.02 * min(error(scale) for scale in grid)


def test_power_of_two_scale_follows_inq_rule() -> None:
    """INQ, equation 2: n1 = floor(log2(4 s / 3)), s the largest magnitude; all values are powers of two then."""
    weight = noise(*SHAPE) * 0.1
    quantizer = PowerOfTwo(spec=weight_spec(), scale="power_of_two")
    calibrate(quantizer, weight)
    largest = float(weight.abs().max())
    assert quantizer.scale.item() == 2.0 ** math.floor(math.log2(4 * largest / 3))
    values = quantizer(weight).abs()
    exponents = values[values > 0].log2()
    assert torch.equal(exponents, exponents.round())
    assert not list(quantizer.parameters())


def test_wrong_options_are_refused() -> None:
    with pytest.raises(
        ValueError, match="PowerOfTwo: scale must be 'learned', 'calibrated' or 'power_of_two', got 'x'"
    ):
        PowerOfTwo(spec=weight_spec(), scale="x")
    with pytest.raises(ValueError, match="APoT: rescale belongs to normalize=true, got normalize=false"):
        APoT(spec=weight_spec(), normalize=False, rescale=True)
    with pytest.raises(ValueError, match=r"APoT: bits must be 2\.\.8, got 9"):
        APoT(spec=weight_spec(9))
    with pytest.raises(ValueError, match=r"PowerOfTwo: bits must be 2\.\.7, got 1"):
        PowerOfTwo(spec=weight_spec(1))


def trained() -> Tensor:
    """Weights with a mean of a tenth of their deviation and channels of different sizes."""
    weight = noise(16, 8, 3, 3) * torch.linspace(0.5, 2, 16).reshape(-1, 1, 1, 1)
    return weight + 0.1 * weight.std()


@pytest.mark.parametrize("make", [nn.Conv2d, nn.Linear, nn.ConvTranspose2d])
@pytest.mark.parametrize("draw", ["default", "kaiming_normal", "orthogonal", "trunc_normal", "constant"])
def test_drawn_weights_do_not_look_trained(make: Any, draw: str) -> None:
    torch.manual_seed(0)
    for inputs, outputs in ((3, 16), (16, 64), (64, 10)):
        layer = make(inputs, outputs, *(() if make is nn.Linear else (3,)))
        if draw == "constant":
            nn.init.constant_(layer.weight, 0.0)
        elif draw != "default":
            getattr(nn.init, f"{draw}_")(layer.weight)
        assert not looks_trained(layer.weight)


def test_trained_weights_look_trained(shared_data: Path) -> None:
    """All convolutions of a public ResNet-20; its last layer has the mean and the spread of a drawn one."""
    assert looks_trained(trained())
    state = torch.load(shared_data / "weights" / "resnet20-12fca82f.th", map_location="cpu", weights_only=True)
    tensors = {name: tensor for name, tensor in state["state_dict"].items() if tensor.ndim == 4}
    assert [name for name, tensor in tensors.items() if not looks_trained(tensor)] == []


@pytest.mark.parametrize(
    ("weight", "plain"), [(trained(), True), (noise(16, 8, 3, 3), False)], ids=["trained", "drawn"]
)
def test_auto_normalizes_drawn_weights_and_keeps_trained_ones(weight: Tensor, plain: bool) -> None:
    """Each against the formula of the form that it takes, in float64."""
    spec = QuantSpec(bits=4, shape=tuple(weight.shape), signed=True)
    quantizer = APoT(spec=spec)
    calibrate(quantizer, weight)
    w = weight.double()
    mean, unit = (0.0, 1.0) if plain else (w.mean(), w.std(correction=0) + 1e-5)
    expected = nearest_by_search((w - mean) / unit, quantizer.scale.item(), mirrored(sums_of_powers(3))) * unit
    torch.testing.assert_close(quantizer(weight).double(), expected, rtol=1e-4, atol=1e-6)
    loaded = APoT(spec=spec)
    loaded.load_state_dict(quantizer.state_dict())
    assert torch.equal(loaded(weight), quantizer(weight)), "the choice is in the state"


def test_the_form_is_said_once_and_a_form_that_changes_a_network_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    spec = QuantSpec(bits=4, shape=(16, 8, 3, 3), signed=True)
    _say_once.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            calibrate(APoT(spec=spec), trained())
            calibrate(APoT(spec=spec, normalize=True), trained())
            calibrate(APoT(spec=spec, normalize=True), noise(16, 8, 3, 3))
    said = [(record.levelname, record.getMessage().partition(" which")[0][:28]) for record in caplog.records]
    assert said == [("INFO", "APoT: the weights look train"), ("WARNING", "APoT: normalize=true takes t")]
