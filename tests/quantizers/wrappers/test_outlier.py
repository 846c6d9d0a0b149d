"""Value-aware quantization: a weight by hand, which values are outliers, the rest's range, sizes, gradients."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qtrain.observers.min_max import MinMax
from qtrain.quantizers.base import Quantizer
from qtrain.quantizers.binary.abc_net import ABCNet
from qtrain.quantizers.binary.bnn import BNN
from qtrain.quantizers.block.mx import MX
from qtrain.quantizers.codebook.kmeans import KMeans
from qtrain.quantizers.uniform.affine import Affine
from qtrain.quantizers.uniform.dynamic import Dynamic
from qtrain.quantizers.uniform.lsq import LSQ
from qtrain.quantizers.wrappers.outlier import Outlier, largest_values
from qtrain.spec import Observed, PerChannel, QuantSpec
from qtrain.storage.base import QTensor, pack, unpack
from qtrain.storage.outliers import OutlierTensor


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def outlier(*shape: int, bits: int = 4, quantizer: Any = Affine, **options: Any) -> Outlier:
    return Outlier(spec=QuantSpec(bits=bits, shape=shape, signed=True), quantizer=quantizer, **options)


def calibrated(quantizer: Quantizer, x: Tensor) -> Quantizer:
    observer = MinMax(granularity=quantizer.granularity)
    observer.update(x)
    quantizer.calibrate_(observer.observed(int(quantizer.bits))._replace(tensor=x))
    return quantizer


def test_a_weight_by_hand() -> None:
    """A fifth of five values is one, 100.0625; the others span 3.5 in 3 bits, so that the step is 3.5 / 3."""
    x = torch.tensor([[1.0, -3.5, 100.0625, 0.2, 2.0]])
    quantizer = calibrated(outlier(1, 5, bits=3, fraction=0.2), x)
    stored = quantizer.quantize(x)
    assert isinstance(stored, OutlierTensor)
    assert stored.positions.tolist() == [2]
    assert stored.codes.tolist() == [[1, -3, 0, 0, 2]]
    expected = torch.tensor([[3.5 / 3, -3.5, 100.0625, 0.0, 7 / 3]])
    torch.testing.assert_close(quantizer(x), expected)
    assert stored.nbits == 5 * 3 + 32 + (3 + 16), "codes, scale, a place among 5, a value"
    assert stored.nbits - stored.code_bits == 32


@given(st.lists(st.integers(-20, 20), min_size=1, max_size=40), st.floats(0, 1))
def test_outliers_are_the_largest_values(values: list[int], fraction: float) -> None:
    """All that is above the largest value left behind; as many as the fraction says, but for equal magnitudes."""
    x = torch.tensor([float(value) for value in values])
    above = largest_values(x, fraction).bool()
    count = round(fraction * len(values))
    ordered = sorted((abs(value) for value in values), reverse=True)
    expected = ordered[:count]
    while expected and count < len(ordered) and expected[-1] == ordered[count]:
        expected.pop()
    assert sorted(x[above].abs().tolist(), reverse=True) == expected


def test_the_share_of_a_continuous_tensor_is_exact() -> None:
    x = noise(100, 50)
    for fraction in (0.0, 0.01, 0.03, 0.5):
        assert int(largest_values(x, fraction).sum()) == round(fraction * 5000)


@pytest.mark.parametrize("granularity", [None, PerChannel(0)])
def test_range_is_calibrated_without_outliers(granularity: PerChannel | None) -> None:
    x = noise(4, 50)
    x[torch.arange(4), torch.arange(4)] = torch.tensor([50.0, -60.0, 70.0, 80.0])
    inner = partial(Affine, granularity=granularity) if granularity else Affine
    quantizer = calibrated(outlier(4, 50, quantizer=inner, fraction=0.02), x)
    rest = x.clone()
    rest[torch.arange(4), torch.arange(4)] = 0
    reach = rest.abs().amax(1, keepdim=True) if granularity else rest.abs().amax()
    assert isinstance(quantizer.inner, Affine)
    torch.testing.assert_close(quantizer.inner.scale, reach / 7)


def test_inner_quantizer_observes_only_the_rest() -> None:
    x = torch.cat([noise(99), torch.tensor([1000.0])]).reshape(1, 100)
    rest = x[:, :99]
    step = calibrated(outlier(1, 100, quantizer=LSQ, fraction=0.01), x).inner
    assert isinstance(step, LSQ)
    torch.testing.assert_close(step.scale.detach(), 2 * rest.abs().mean() / 7**0.5)
    clusters = calibrated(outlier(1, 100, bits=2, quantizer=KMeans, fraction=0.01), x).inner
    assert isinstance(clusters, KMeans)
    assert float(clusters.codebook.detach().abs().max()) <= float(rest.abs().max())
    blocks = calibrated(outlier(1, 100, quantizer=MX, fraction=0.01), x)
    alone = MX(spec=QuantSpec(bits=4, shape=(1, 99), signed=True))(rest)
    torch.testing.assert_close(blocks(x)[:, :99], alone, rtol=0, atol=0)


def test_observer_decides_the_range_of_inputs() -> None:
    quantizer = Outlier(spec=QuantSpec(bits=4), quantizer=Affine, fraction=0.03)
    one = torch.tensor(1.0)
    quantizer.calibrate_(Observed(0 * one, 3 * one, one))
    assert (bool(quantizer.signed), bool(quantizer.initialized)) == (False, True)
    assert float(quantizer.inner.scale) == pytest.approx(3 / 15)  # type: ignore[arg-type]
    x = noise(10, 100).abs() * 4
    result, above = quantizer(x), largest_values(x, 0.03).bool()
    torch.testing.assert_close(result[above], x[above], rtol=2**-11, atol=0)
    assert torch.equal(result[~above], quantizer.inner(x)[~above])
    assert float(result[~above].max()) <= 3 < float(result[above].min())
    assert quantizer.storage_bits() == 32, "the outliers are the input's own"
    assert Outlier(spec=QuantSpec(bits=4), quantizer=Dynamic).storage_bits() == 0


@pytest.mark.parametrize(("store", "steps", "most"), [("float16", 2**11, 65504.0), ("bfloat16", 2**8, 3.3895e38)])
def test_outliers_are_rounded_to_16_bits(store: Any, steps: int, most: float) -> None:
    x = torch.cat([torch.zeros(6), torch.tensor([1.0 + 1 / steps / 4, -9.87, 1e39, -1e39])]).clamp(-3.4e38, 3.4e38)
    result = outlier(10, fraction=0.4, store=store)(x)
    assert result[6] == 1.0
    torch.testing.assert_close(result[7], x[7], rtol=1 / steps, atol=0)
    torch.testing.assert_close(result[8:], torch.tensor([most, -most]), rtol=1e-4, atol=0)


def test_gradients_are_exact_for_outliers_and_the_inner_quantizers_for_the_rest() -> None:
    x, upstream = noise(8, 25) * 4, noise(8, 25, seed=1)
    quantizer = outlier(8, 25, bits=3, quantizer=LSQ, fraction=0.1)  # step 1: beyond 3 the inner gradient is 0
    above = largest_values(x, 0.1).bool()
    leaf = x.clone().requires_grad_()
    grad, step_grad = torch.autograd.grad(quantizer(leaf), [leaf, quantizer.inner.scale], upstream)  # type: ignore[list-item]
    inner_leaf = x.masked_fill(above, 0.0).requires_grad_()
    inner_grad, inner_step = torch.autograd.grad(
        quantizer.inner(inner_leaf),
        [inner_leaf, quantizer.inner.scale],  # type: ignore[list-item]
        upstream.masked_fill(above, 0.0),
    )
    assert torch.equal(grad, torch.where(above, upstream, inner_grad))
    torch.testing.assert_close(step_grad, inner_step)
    assert int((grad[~above] == 0).sum()) > 0


@pytest.mark.parametrize(
    "inner",
    [Affine, partial(KMeans, huffman=True), ABCNet, MX, partial(Outlier, quantizer=Affine, fraction=0.2)],
    ids=["affine", "huffman", "planes", "blocks", "itself"],
)
def test_any_kind_of_storage_inside_is_read_back_whole(inner: Any) -> None:
    """From shapes alone: nothing of the values or of the codes that were written is in what reads them."""
    x = noise(6, 20)
    quantizer = calibrated(outlier(6, 20, bits=3, quantizer=inner, fraction=0.1), x)
    stored = quantizer.quantize(x)
    data = pack(stored)
    assert len(data) == -(-stored.nbits // 8)
    back = unpack(data, like=emptied(stored))
    assert torch.equal(back.dequantize(), stored.dequantize())
    assert torch.equal(stored.dequantize(), quantizer.eval()(x))


def emptied(tensor: QTensor) -> QTensor:
    """``tensor`` with zeros for all that its parts hold."""
    found: dict[str, Any] = {}
    for name in tensor.parts():
        value = getattr(tensor, name)
        found[name] = emptied(value) if isinstance(value, QTensor) else torch.zeros_like(value)
    if "codes" in found:
        found["codes"] = found["codes"] + tensor.low
    return replace(tensor, **found)


def test_it_hands_on_the_projection_of_the_weight() -> None:
    assert outlier(3, 4, bits=1, quantizer=BNN).project(torch.full((3, 4), 7.0)).max() <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 1.0}, r"Outlier: fraction must be in \[0, 1\), got 1.0; 0.01 to 0.03 is usual"),
        ({"store": "float32"}, r"Outlier: store must be one of \['float16', 'bfloat16'\], got 'float32'"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        outlier(3, 4, **options)
