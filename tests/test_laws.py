"""The laws that every quantizer in conf/quantizer obeys, whoever wrote it: a new YAML is under test without an edit.

Each law is a function of one calibrated quantizer and the tensor that it was calibrated on; the one test at the end
puts every law to every quantizer, over granularities, bits, shapes, dtypes, layouts and kinds of data.
"""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from qtrain.observers.min_max import MinMax
from qtrain.quantizers.base import Quantizer
from qtrain.spec import Granularity, PerChannel, PerTensor, QuantSpec
from qtrain.tasks import conf_dir
from qtrain.tasks.config import compose
from qtrain.tasks.instantiate import instantiate

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "affine": [{}, {"symmetric": False}, {"narrow": True}],
    "lsq": [{}, {"init": "range"}],
}
"""Options that change what a quantizer computes; one that is not named here is tested as its YAML stands."""

QUANTIZERS = [
    (path.stem, options)
    for path in sorted((conf_dir() / "quantizer").glob("*.yaml"))
    for options in OPTIONS.get(path.stem, [{}])
]

DATA: dict[str, Callable[[Tensor], Tensor]] = {
    "signed": lambda noise: noise,
    "one_sided": lambda noise: noise.abs(),
    "negative": lambda noise: -noise.abs(),
    "zeros": lambda noise: torch.zeros_like(noise),
    "constant": lambda noise: torch.full_like(noise, -0.3),
    "outlier": lambda noise: torch.where(noise == noise.max(), 1e4, noise) if noise.numel() else noise,
    "tiny": lambda noise: noise * 1e-30,
}

PER_TENSOR = PerTensor()
SHAPES = [(), (1,), (5,), (4, 3), (4, 3, 2, 5), (0, 3), (3, 0, 2)]


@dataclass(frozen=True)
class Case:
    """One tensor and what is asked of the quantizer for it; ``weight`` says whether the shape is known ahead."""

    granularity: Granularity = PER_TENSOR
    bits: int = 4
    shape: tuple[int, ...] = (4, 3, 2, 5)
    dtype: torch.dtype = torch.float32
    data: str = "signed"
    weight: bool = True
    channels_last: bool = False

    def tensor(self) -> Tensor:
        noise = torch.randn(self.shape, generator=torch.Generator().manual_seed(len(self.shape)))
        x = DATA[self.data](noise).to(self.dtype)
        return x.to(memory_format=torch.channels_last) if self.channels_last else x

    def spec(self) -> QuantSpec:
        return QuantSpec(bits=self.bits, shape=self.shape, signed=True) if self.weight else QuantSpec(bits=self.bits)


def cases() -> Iterator[Case]:
    granularities = [(PerTensor(), True), (PerTensor(), False), (PerChannel(0), True), (PerChannel(-1), True)]
    for (granularity, weight), bits in itertools.product(granularities, (2, 3, 8, 16)):
        base = Case(granularity=granularity, weight=weight, bits=bits)
        for shape in SHAPES:
            if shape or isinstance(granularity, PerTensor):
                for dtype in (torch.float32, torch.bfloat16, torch.float16):
                    yield replace(base, shape=shape, dtype=dtype)
                for data in DATA:
                    yield replace(base, shape=shape, data=data)
        yield replace(base, channels_last=True)
        yield replace(base, channels_last=True, dtype=torch.bfloat16, data="one_sided")


@lru_cache
def constructor(name: str, options: tuple[tuple[str, Any], ...]) -> Callable[..., Quantizer]:
    cfg = compose([f"quantizer@quantize.weight={name}", *(f"quantize.weight.{k}={v}" for k, v in options)])
    made: Callable[..., Quantizer] = instantiate(cfg.quantize.weight)
    return made


def build(name: str, options: dict[str, Any], case: Case) -> Quantizer:
    quantizer = constructor(name, tuple(options.items()))(spec=case.spec(), granularity=case.granularity)
    x = case.tensor()
    if x.numel():
        observer = MinMax(granularity=case.granularity)
        observer.update(x)
        quantizer.calibrate_(observer.observed(case.bits))
    return quantizer.eval()


def forward_is_dequantised_codes(quantizer: Quantizer, x: Tensor, case: Case) -> None:
    assert torch.equal(quantizer(x), quantizer.quantize(x).dequantize())
    beyond = x * 3 + 1  # values that calibration has not seen, beyond the range on either side
    assert torch.equal(quantizer(beyond), quantizer.quantize(beyond).dequantize())


def codes_lie_in_range(quantizer: Quantizer, x: Tensor, case: Case) -> None:
    for values in (x, x * 100, -x * 100):
        stored = quantizer.quantize(values)
        assert not stored.codes.is_floating_point()
        assert ((stored.low <= stored.codes) & (stored.codes <= stored.high)).all()
    assert stored.high - stored.low < 2**stored.bits
    assert stored.bits == case.bits


def state_is_there_from_the_start_and_survives_a_file(quantizer: Quantizer, x: Tensor, case: Case) -> None:
    file = io.BytesIO()
    torch.save(quantizer.state_dict(), file)
    file.seek(0)
    fresh = copy.deepcopy(quantizer)
    for tensor in [*fresh.parameters(), *fresh.buffers()]:
        tensor.data.zero_()
    fresh.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert torch.equal(fresh(x), quantizer(x))
    before, after = fresh.quantize(x), quantizer.quantize(x)
    assert torch.equal(before.codes, after.codes)
    assert (before.bits, before.low, before.high) == (after.bits, after.low, after.high)
    assert bool(fresh.initialized) == bool(quantizer.initialized) == (x.numel() > 0)


def shape_dtype_and_layout_are_kept(quantizer: Quantizer, x: Tensor, case: Case) -> None:
    for result in (quantizer(x), quantizer.quantize(x).dequantize()):
        assert result.shape == x.shape
        assert result.dtype == x.dtype
        if case.channels_last:
            assert result.is_contiguous(memory_format=torch.channels_last)
    assert quantizer.quantize(x).codes.shape == x.shape


def disabled_is_the_identity(quantizer: Quantizer, x: Tensor, case: Case) -> None:
    quantizer.enabled = False
    assert quantizer(x) is x
    quantizer.enabled = True


def what_is_not_finite_is_refused(quantizer: Quantizer, x: Tensor, case: Case) -> None:
    for bad in (float("nan"), float("inf"), float("-inf")):
        spoilt = x.clone()
        if spoilt.numel():
            spoilt.view(-1)[-1:].fill_(bad) if spoilt.is_contiguous() else spoilt.fill_(bad)
            with pytest.raises(ValueError, match="NaN or infinity"):
                quantizer.quantize(spoilt)


def storage_is_exact(quantizer: Quantizer, x: Tensor, case: Case) -> None:
    stored = quantizer.quantize(x)
    zero_points = 0 if stored.zero_point is None else stored.zero_point.numel()
    assert stored.scale.shape == case.granularity.state_shape(case.shape if case.weight else ())
    assert stored.nbits == x.numel() * case.bits + stored.scale.numel() * stored.scale_bits + zero_points * case.bits
    assert quantizer.storage_bits() == stored.nbits - x.numel() * case.bits


def zero_is_exact(quantizer: Quantizer, x: Tensor, case: Case) -> None:
    zeros = torch.zeros_like(x)
    assert torch.equal(quantizer(zeros), zeros), "padding and a ReLU's zeros must stay zeros"


def gradients_are_finite(quantizer: Quantizer, x: Tensor, case: Case) -> None:
    leaf = x.clone().requires_grad_()
    learned = list(quantizer.parameters())
    grads = torch.autograd.grad(quantizer(leaf).float().sum(), [leaf, *learned])
    for grad, tensor in zip(grads, [leaf, *learned], strict=True):
        assert grad.shape == tensor.shape
        assert torch.isfinite(grad).all()


def bits_change_in_place(quantizer: Quantizer, x: Tensor, case: Case) -> None:
    for bits in (5, case.bits):
        quantizer.set_range_(bits=bits, signed=bool(quantizer.signed))
        stored = quantizer.quantize(x)
        assert stored.bits == bits
        assert torch.equal(quantizer(x), stored.dequantize())


LAWS = [
    forward_is_dequantised_codes,
    codes_lie_in_range,
    state_is_there_from_the_start_and_survives_a_file,
    shape_dtype_and_layout_are_kept,
    disabled_is_the_identity,
    what_is_not_finite_is_refused,
    storage_is_exact,
    zero_is_exact,
    gradients_are_finite,
    bits_change_in_place,
]


def label(value: Any) -> str | None:
    if callable(value):
        return value.__name__
    return "+".join(f"{k}={v}" for k, v in value.items()) or "default" if isinstance(value, dict) else None


@pytest.mark.parametrize("law", LAWS, ids=label)
@pytest.mark.parametrize(("name", "options"), QUANTIZERS, ids=label)
def test_law(name: str, options: dict[str, Any], law: Callable[[Quantizer, Tensor, Case], None]) -> None:
    for case in cases():
        try:
            law(build(name, options, case), case.tensor(), case)
        except Exception as error:
            raise AssertionError(f"{law.__name__} fails for {case}: {error}") from error


@pytest.mark.parametrize("case", [Case(weight=False), Case(granularity=PerChannel(0))], ids=["input", "weight"])
@pytest.mark.parametrize(("name", "options"), QUANTIZERS, ids=label)
def test_one_graph_for_all_bits(name: str, options: dict[str, Any], case: Case) -> None:
    """Principle 4: no graph break, and no second compilation when a schedule changes bits; values as uncompiled."""
    graphs = 0

    def counting(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    quantizer = build(name, options, case).train()
    compiled = torch.compile(quantizer, backend=counting, fullgraph=True)
    for bits in (4, 3, 8):
        quantizer.set_range_(bits=bits, signed=bool(quantizer.signed))
        leaf = case.tensor().requires_grad_()
        result = compiled(leaf)
        (grad,) = torch.autograd.grad(result.sum(), [leaf])
        assert torch.equal(result, quantizer(leaf))
        assert torch.equal(grad, torch.autograd.grad(quantizer(leaf).sum(), [leaf])[0])
    assert graphs == 1


def test_every_yaml_is_among_the_quantizers() -> None:
    assert set(OPTIONS) <= {name for name, _ in QUANTIZERS}, "options of a quantizer that is no more"
