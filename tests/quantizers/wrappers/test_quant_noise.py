"""QuantNoise: shares of quantized blocks, gradients of both parts, and its ends."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from qtrain.quantizers.base import Quantizer
from qtrain.quantizers.binary.bnn import BNN
from qtrain.quantizers.hooks import begin_step_
from qtrain.quantizers.uniform.affine import Affine
from qtrain.quantizers.uniform.lsq import LSQ
from qtrain.quantizers.wrappers.quant_noise import QuantNoise, block_mask
from qtrain.schedules.linear import Linear
from qtrain.spec import QuantSpec


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def noisy(*shape: int, bits: int = 4, quantizer: Any = Affine, **options: Any) -> QuantNoise:
    made = QuantNoise(spec=QuantSpec(bits=bits, shape=shape, signed=True), quantizer=quantizer, **options)
    return made.train()


def drawn(rate: float, shape: tuple[int, ...], block: int, key: int = 7) -> Tensor:
    return block_mask(torch.tensor(key), torch.tensor(rate), shape, block)


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("key", [1, 2, 3])
def test_the_share_of_quantized_blocks_is_the_rate(rate: float, key: int) -> None:
    """80000 independent blocks: within four standard deviations."""
    share = float(drawn(rate, (400, 200, 3, 3), 9, key).float().mean())
    assert abs(share - rate) < 4 * math.sqrt(rate * (1 - rate) / 80000)


def test_blocks_are_drawn_whole_and_independently() -> None:
    rows = drawn(0.5, (64, 10), 4)  # blocks of 4, 4 and 2
    for begin, end in ((0, 4), (4, 8), (8, 10)):
        block = rows[:, begin:end]
        assert torch.equal(block, block[:, :1].expand_as(block))
    firsts = rows[:, [0, 4, 8]].float()
    agreement = (firsts[:, 0] == firsts[:, 1]).float().mean(), (firsts[1:, 2] == firsts[:-1, 2]).float().mean()
    assert all(0.25 < float(share) < 0.75 for share in agreement), "neighbors do not follow each other"


@pytest.mark.parametrize(("shape", "block", "size"), [((6, 5, 3, 3), 0, 9), ((6, 16), 0, 8), ((6, 16, 1, 1), 4, 4)])
def test_default_blocks_match_the_paper(shape: tuple[int, ...], block: int, size: int) -> None:
    quantizer = noisy(*shape, rate=0.5, block=block)
    begin_step_(quantizer, seed=0, step=1, progress=0.0)
    x = noise(*shape)
    left = (quantizer(x) == x).reshape(-1, size)  # no draw of noise is a multiple of the step, 1
    assert torch.equal(left, left[:, :1].expand_as(left))
    assert 0 < int(left[:, 0].sum()) < len(left)


@pytest.mark.parametrize("inner", [Affine, LSQ])
def test_each_block_is_quantized_or_itself_with_its_own_gradient(inner: Any) -> None:
    """Beyond the range the inner gradient is 0, so that the two kinds of gradient differ."""
    quantizer = noisy(16, 32, quantizer=inner, rate=0.5, block=4)
    begin_step_(quantizer, seed=0, step=1, progress=0.0)
    x, upstream = (noise(16, 32) * 10).requires_grad_(), noise(16, 32, seed=1)
    result = quantizer(x)
    (grad,) = torch.autograd.grad(result, x, upstream)
    expected = quantizer.inner(x)
    (inner_grad,) = torch.autograd.grad(expected, x, upstream)
    kept = result == x
    assert torch.equal(grad[kept], upstream[kept]), "exact where the value is"
    assert torch.equal(result[~kept], expected[~kept])
    assert torch.equal(grad[~kept], inner_grad[~kept])
    assert int((inner_grad[kept] == 0).sum()) > 10


def test_the_mean_over_draws_is_the_blend_of_both() -> None:
    x, rate, steps = noise(4, 8), 0.3, 4000
    quantizer = noisy(4, 8, rate=rate, block=2)
    total = torch.zeros(4, 8, dtype=torch.float64)
    for step in range(steps):
        begin_step_(quantizer, seed=0, step=step, progress=0.0)
        total += quantizer(x)
    expected = (1 - rate) * x + rate * x.round()
    deviation = math.sqrt(rate * (1 - rate) / steps) * (x - x.round()).abs()
    assert ((total / steps - expected).abs() <= 4.5 * deviation + 1e-6).all()


def test_rate_zero_is_the_weight_and_rate_one_the_quantizer() -> None:
    x = noise(6, 5, 3, 3)
    for step in range(3):
        for rate, expected in ((0.0, x), (1.0, x.round())):
            quantizer = noisy(6, 5, 3, 3, rate=rate)
            begin_step_(quantizer, seed=0, step=step, progress=0.5)
            assert torch.equal(quantizer(x), expected)
            assert torch.equal(quantizer.eval()(x), x.round()), "in eval mode all is quantized"


def test_the_rate_follows_its_schedule_and_draws_differ_from_step_to_step() -> None:
    quantizer = noisy(64, 64, rate=Linear(start=0.0, end=1.0))
    x, shares, masks = noise(64, 64), [], []
    for step, progress in enumerate((0.0, 0.5, 0.5, 1.0)):
        begin_step_(quantizer, seed=0, step=step, progress=progress)
        masks.append(quantizer(x) != x)
        shares.append(float(masks[-1].float().mean()))
    assert shares[0] == 0
    assert shares[1:3] == pytest.approx([0.5, 0.5], abs=0.1)
    assert shares[3] == 1
    assert not torch.equal(masks[1], masks[2])


def test_projection_of_the_inner_quantizer_is_applied() -> None:
    binary = noisy(3, 4, bits=1, quantizer=BNN, rate=0.5)
    assert binary.project(torch.full((3, 4), 7.0)).max() <= 1
    inner: Quantizer = noisy(3, 4, quantizer=partial(QuantNoise, quantizer=LSQ, rate=0.5), rate=0.5).inner
    assert isinstance(inner, QuantNoise)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 1.5}, r"QuantNoise: rate must be in \[0, 1\], got 1.5; or give a schedule"),
        ({"rate": 0.5, "block": -1}, "QuantNoise: block must be at least 1, or 0 for the kernel's size, got -1"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        noisy(3, 4, **options)


def test_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="QuantNoise: quantizes weights only, not an input"):
        QuantNoise(spec=QuantSpec(bits=4), quantizer=Affine, rate=0.5)
