"""The laws that every quantizer in conf/quantizer obeys, whoever wrote it: a new YAML is under test without an edit.

Each law is a function of one calibrated quantizer and the tensor that it was calibrated on; the one test at the end
puts every law to every quantizer, over granularities, bits, shapes, dtypes, layouts and kinds of data.
"""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qtrain.config.compose import compose
from qtrain.observers.min_max import MinMax
from qtrain.observers.percentile import Percentile
from qtrain.quantizers.base import Quantizer
from qtrain.quantizers.hooks import begin_step_
from qtrain.settings.conf_dir import conf_dir
from qtrain.spec import Granularity, PerBlock, PerChannel, PerGroup, PerTensor, QuantSpec
from qtrain.storage.base import QTensor, pack, unpack
from qtrain.storage.description import describe, restore
from tests.helpers.graphs import CountingBackend, kept_by_compiled
from tests.helpers.no_wait import NoWait

REFUSALS = (
    "bits must be",
    "quantizes weights only",
    "quantizes inputs only",
    "leave no positive code",
    "is outside a",
    "does not divide",
    "needs a weight of",
)
"""What a constructor may refuse: a width, a role, or a shape that the method does not have; tested elsewhere."""

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "affine": [{}, {"symmetric": False}, {"narrow": True}],
    "apot": [{}, {"normalize": False}, {"normalize": True}, {"normalize": True, "rescale": True}],
    "binary_connect": [{}, {"stochastic": True}, {"bound": "glorot"}],
    "blend": [{}, {"straight_through": False}],
    "bnn": [{}, {"center": False}],
    "bnn_plus": [{}, {"regularizer": "l1", "strength": 0.1}],
    "duq": [{}, {"lower": -0.375}],
    "dynamic": [{}, {"symmetric": False}],
    "incremental": [{}, {"by": "random", "share": 0.5}],
    "kmeans": [{}, {"train": "both", "huffman": True}],
    "lsq": [{}, {"init": "range"}],
    "ocp_mx": [{}, {"element": "e3m2"}, {"element": "e5m2"}, {"element": "int8"}],
    "oscillation": [{}, {"dampening": 0, "threshold": 0.02}],
    "outlier": [{}, {"fraction": 0.5, "store": "bfloat16"}],
    "pact": [{}, {"init": 10.0}],
    "power_of_two": [{}, {"scale": "calibrated"}, {"scale": "power_of_two"}],
    "product": [{}, {"train": "both", "start": 0.6}],
    "pruned": [{}, {"share": 0.9, "gap_bits": 2, "huffman": True}],
    "prox_quant": [{}, {"norm": "l2", "hard_from": 0.5}],
    "qil": [{}, {"learn_gamma": False}],
    "quant_noise": [{}, {"block": 3, "rate": 1.0}],
    "twn": [{}, {"exact": True}],
    "vsq": [{}, {"size": 3, "scale_bits": 2}],
    "weighted_entropy": [{}, {"update": False}],
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
    "outlier": lambda noise: torch.where(noise == noise.max(), 300.0, noise) if noise.numel() else noise,
    "tiny": lambda noise: noise * 1e-30,
}

PER_TENSOR = PerTensor()
SHAPES = [(), (1,), (5,), (4, 3), (4, 4, 2, 5), (0, 3), (3, 0, 2)]
GRANULARITIES: list[tuple[Granularity, bool]] = [
    (PER_TENSOR, True),
    (PER_TENSOR, False),
    (PerChannel(0), True),
    (PerChannel(-1), True),
    (PerGroup(2), True),
    (PerBlock(2), True),
]
"""And whether the tensor is a weight, whose shape is known ahead."""


@dataclass(frozen=True)
class Case:
    """One tensor and what is asked of the quantizer for it; ``weight`` says whether the shape is known ahead."""

    granularity: Granularity = PER_TENSOR
    bits: int = 4
    shape: tuple[int, ...] = (4, 4, 2, 5)
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


def cases(widths: range) -> Iterator[Case]:
    """Every granularity with every shape, type and kind of data, and every width, though not each with each."""
    usual = itertools.cycle([bits for bits in (4, 2, 8, 1, 6) if bits in widths] or [widths.start])
    kinds = itertools.cycle(DATA)
    for granularity, weight in GRANULARITIES:
        base = Case(granularity=granularity, weight=weight)
        for shape in SHAPES:
            if shape or not weight:
                for dtype in (torch.float32, torch.bfloat16, torch.float16):
                    yield replace(base, bits=next(usual), shape=shape, dtype=dtype, data=next(kinds))
        for data in DATA:
            yield replace(base, bits=next(usual), data=data)
        yield replace(base, bits=next(usual), channels_last=True)
        yield replace(base, bits=next(usual), channels_last=True, dtype=torch.bfloat16, data="one_sided")
    for bits in widths:
        yield Case(bits=bits)
        yield Case(bits=bits, weight=False, data="one_sided")
    yield Case(bits=next(usual), shape=(64, 32, 3, 3), granularity=PerChannel(0))
    yield Case(bits=next(usual), shape=(2, 32, 17, 17), weight=False, data="one_sided")


@lru_cache
def constructor(name: str, options: tuple[tuple[str, Any], ...]) -> partial[Quantizer]:
    cfg = compose([f"quantizer@quantize.weight={name}", *(f"quantize.weight.{k}={v}" for k, v in options)])
    made: partial[Quantizer] = cfg.quantize.weight.build()
    return made


def takes_granularity(made: Callable[..., Quantizer]) -> bool:
    return "granularity" in inspect.signature(made).parameters


def build(name: str, options: dict[str, Any], case: Case) -> Quantizer | None:
    """The case's quantizer, calibrated, a copy; ``None`` for what the quantizer says that it is not made for."""
    return copy.deepcopy(calibrated(name, tuple(options.items()), case))


@lru_cache(maxsize=1024)  # for all laws, which follow one another for each quantizer
def calibrated(name: str, options: tuple[tuple[str, Any], ...], case: Case) -> Quantizer | None:
    made = constructor(name, options)
    chosen = {"granularity": case.granularity} if takes_granularity(made) else {}
    x = case.tensor()
    try:
        quantizer = made(spec=case.spec(), **chosen)
        if x.numel():
            observers = [kind(granularity=quantizer.granularity) for kind in (MinMax, Percentile)]
            for observer in observers:
                observer.update(x)
            seen, binned = (observer.observed(case.bits) for observer in observers)
            tensor = x if case.weight else None
            quantizer.calibrate_(seen._replace(tensor=tensor, histogram=binned.histogram))
    except ValueError as error:
        if any(reason in str(error) for reason in REFUSALS):
            return None
        raise
    return quantizer.eval()


@lru_cache
def applicable(name: str, options: tuple[tuple[str, Any], ...]) -> list[Case]:
    """The cases that a quantizer takes; what it has no granularity for is tried once and not once for each."""
    made = constructor(name, options)
    takes = takes_granularity(made)
    return [
        case
        for case in cases(made.func.widths)
        if (takes or isinstance(case.granularity, PerTensor)) and calibrated(name, options, case) is not None
    ]


def forward_is_dequantized_codes(quantizer: Quantizer, x: Tensor, case: Case) -> None:
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
    assert 1 <= stored.operand_bits <= 32


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
        assert quantizer(x).is_contiguous(memory_format=torch.channels_last)


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


def same(a: Any, b: Any) -> bool:
    """Whether two stored tensors hold the same, field by field, bit for bit."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, QTensor):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return bool(a == b)


def storage_is_exact_and_lossless(quantizer: Quantizer, x: Tensor, case: Case) -> None:
    stored = quantizer.quantize(x)
    data = pack(stored)
    assert len(data) == -(-stored.nbits // 8)
    assert same(unpack(data, like=replace(stored, codes=torch.full_like(stored.codes, stored.low))), stored)
    like = restore(json.loads(json.dumps(describe(stored))))
    assert same(unpack(data, like=like), stored)


def an_input_runs_from_what_is_stored_of_it(quantizer: Quantizer, x: Tensor, case: Case) -> None:
    if case.weight or not x.numel():
        return
    state = [part.write() for part in quantizer.stored_state().values()]
    assert quantizer.storage_bits() == sum(bits.numel() for bits in state)
    fresh = copy.deepcopy(quantizer)
    for part in fresh.stored_state().values():
        part.values.fill_(0)
    fresh.load_state_(torch.cat([torch.zeros(0, dtype=torch.uint8), *state]))
    assert torch.equal(fresh(x), quantizer(x))


def zero_is_exact(quantizer: Quantizer, x: Tensor, case: Case) -> None:
    if not quantizer.keeps_zero:
        return
    zeros = torch.zeros_like(x)
    assert torch.equal(quantizer(zeros), zeros), "padding and a ReLU's zeros must stay zeros"


def gradients_are_finite(quantizer: Quantizer, x: Tensor, case: Case) -> None:
    quantizer.train()
    begin_step_(quantizer, seed=0, step=3, progress=0.5)
    leaf = x.clone().requires_grad_()
    learned = list(quantizer.parameters())
    grads = torch.autograd.grad(quantizer(leaf).float().sum(), [leaf, *learned], allow_unused=not case.shape)
    for grad, tensor in zip(grads, [leaf, *learned], strict=True):
        if grad is not None:
            assert grad.shape == tensor.shape
            assert torch.isfinite(grad).all()


def bits_change_in_place(quantizer: Quantizer, x: Tensor, case: Case) -> None:
    for bits in (case.bits + 1, case.bits):
        if bits in quantizer.widths and quantizer.switchable:
            quantizer.set_range_(bits=bits, signed=bool(quantizer.signed))
            stored = quantizer.quantize(x)
            assert stored.bits == bits
            assert torch.equal(quantizer(x), stored.dequantize())


def a_step_is_a_function_of_its_number(quantizer: Quantizer, x: Tensor, case: Case) -> None:
    """Principle 1: what a forward draws in training depends on (seed, step), not on how often it was asked."""
    twins = [copy.deepcopy(quantizer).train() for _ in range(2)]
    for twin, steps in zip(twins, ((5,), (1, 2, 5)), strict=True):
        for step in steps:
            begin_step_(twin, seed=0, step=step, progress=step / 10)
    torch.manual_seed(1)
    first = twins[0](x)
    torch.manual_seed(2)
    assert torch.equal(first, twins[1](x))


def a_step_does_not_wait_for_a_number(quantizer: Quantizer, x: Tensor, case: Case) -> None:
    """Principle 4: no ``.item()``, no branch on a value, no shape that depends on one, in forward and backward."""
    if not case.shape:  # torch reads an index without dimensions, and no layer has such a tensor
        return
    quantizer.train()
    leaf = x.clone().requires_grad_()
    with NoWait():  # type: ignore[no-untyped-call]
        begin_step_(quantizer, seed=0, step=3, progress=0.5)
        result = quantizer(leaf)
        if result.requires_grad:
            result.float().sum().backward()


LAWS = [
    forward_is_dequantized_codes,
    codes_lie_in_range,
    state_is_there_from_the_start_and_survives_a_file,
    shape_dtype_and_layout_are_kept,
    disabled_is_the_identity,
    what_is_not_finite_is_refused,
    storage_is_exact_and_lossless,
    an_input_runs_from_what_is_stored_of_it,
    zero_is_exact,
    gradients_are_finite,
    bits_change_in_place,
    a_step_is_a_function_of_its_number,
    a_step_does_not_wait_for_a_number,
]


def label(value: Any) -> str | None:
    if callable(value):
        return value.__name__
    return "+".join(f"{k}={v}" for k, v in value.items()) or "default" if isinstance(value, dict) else None


@pytest.mark.parametrize("law", LAWS, ids=label)
@pytest.mark.parametrize(("name", "options"), QUANTIZERS, ids=label)
def test_law(name: str, options: dict[str, Any], law: Callable[[Quantizer, Tensor, Case], None]) -> None:
    tried = applicable(name, tuple(options.items()))
    assert len(tried) >= 20, "a quantizer that refuses everything obeys no law"
    for case in tried:
        quantizer = build(name, options, case)
        assert quantizer is not None
        try:
            law(quantizer, case.tensor(), case)
        except Exception as error:
            raise AssertionError(f"{law.__name__} fails for {case}: {error}") from error


@pytest.mark.parametrize("weight", [False, True], ids=["input", "weight"])
@pytest.mark.parametrize(
    ("name", "options"),
    [pytest.param(name, options, marks=[pytest.mark.slow] * bool(options)) for name, options in QUANTIZERS],
    ids=label,
)
def test_one_graph_for_all_bits_and_steps(name: str, options: dict[str, Any], weight: bool) -> None:
    """Principle 4: no graph break, and no second compilation when bits, rates or keys change; values as uncompiled."""
    tried = [case for case in applicable(name, tuple(options.items())) if case.weight == weight]
    case = next((case for case in tried if case.shape == Case.shape), None)
    if case is None:
        pytest.skip(f"{name} is not made for {'weights' if weight else 'inputs'}")
    backend = CountingBackend()
    quantizer = build(name, options, case)
    assert quantizer is not None
    compiled = torch.compile(quantizer.train(), backend=backend, fullgraph=True)
    for step, bits in enumerate((case.bits, case.bits + 1, case.bits + 2)):
        if bits in quantizer.widths and quantizer.switchable:
            quantizer.set_range_(bits=bits, signed=bool(quantizer.signed))
        begin_step_(quantizer, seed=0, step=step, progress=step / 2)
        before = copy.deepcopy(quantizer)
        leaf, expected = case.tensor().requires_grad_(), case.tensor().requires_grad_()
        result, uncompiled = compiled(leaf), before(expected)
        torch.testing.assert_close(result, uncompiled, rtol=1e-6, atol=1e-7)
        (grad,) = torch.autograd.grad(result.sum(), [leaf])
        torch.testing.assert_close(grad, torch.autograd.grad(uncompiled.sum(), [expected])[0], rtol=1e-5, atol=1e-7)
    assert backend.graphs == 1


@pytest.mark.parametrize("weight", [False, True], ids=["input", "weight"])
@pytest.mark.parametrize("name", sorted({name for name, _ in QUANTIZERS}))
def test_compiled_code_keeps_no_booleans(name: str, weight: bool) -> None:
    """Inductor stores booleans one by one on a CPU, however wide the rest of a loop is."""
    tried = [case for case in applicable(name, ()) if case.weight == weight]
    case = next((case for case in tried if case.shape == Case.shape), None)
    if case is None:
        pytest.skip(f"{name} is not made for {'weights' if weight else 'inputs'}")
    quantizer = build(name, {}, case)
    assert quantizer is not None
    begin_step_(quantizer.train(), seed=0, step=0, progress=0.0)
    x = case.tensor()
    unit = torch.eye(
        x.shape[-1], requires_grad=True
    )  # products, so that the input is not simply computed again, and the result is needed
    kept = kept_by_compiled(lambda leaf: F.linear(quantizer(F.linear(leaf, unit)), unit), x, inputs_too=False)
    assert any(one.dtype == x.dtype for one in kept), "the result at least"
    assert not [one.shape for one in kept if one.dtype == torch.bool and one.numel() >= x.numel() / 2]


def test_every_yaml_is_among_the_quantizers() -> None:
    assert set(OPTIONS) <= {name for name, _ in QUANTIZERS}, "options of a quantizer that is no more"
