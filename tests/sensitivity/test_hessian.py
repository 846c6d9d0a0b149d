"""Products, traces and eigenvalues against the exact Hessian of a small network, and against curvlinops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtrain.convert.bank import QuantizerBank
from qtrain.sensitivity.base import scoring
from qtrain.sensitivity.hawq_eigenvalue import HawqEigenvalue
from qtrain.sensitivity.hawq_trace import HawqTrace
from qtrain.sensitivity.hessian import Curvature, noise_power, random_signs
from qtrain.spec import Batch, Choice

LAYERS = ("stem", "depthwise", "place", "mix", "head")


def loss_by_weights(bank: QuantizerBank, images: Tensor, target: Tensor) -> Any:
    """The mean loss as a function of weights by their layer's name; a tied weight is that of both layers."""
    rest = {name: tensor.detach() for name, tensor in bank.model.named_parameters()}

    def loss(weights: dict[str, Tensor]) -> Tensor:
        named = rest | {f"{name}.weight": weight for name, weight in weights.items()}
        logits = torch.func.functional_call(bank.model, named, (images,), tie_weights=True)
        return F.cross_entropy(logits, target)

    return loss


def weights_of(bank: QuantizerBank) -> dict[str, Tensor]:
    return {name: bank.layers[name].weight.detach() for name in LAYERS}  # type: ignore[union-attr]


def exact_block(bank: QuantizerBank, images: Tensor, target: Tensor, name: str) -> Tensor:
    """The Hessian by the weight of one layer, (elements, elements)."""
    loss, weight = loss_by_weights(bank, images, target), weights_of(bank)[name]
    hessian = torch.func.hessian(lambda w: loss({name: w}))(weight)
    return hessian.detach().reshape(weight.numel(), weight.numel())


def exact_input_block(bank: QuantizerBank, image: Tensor, target: Tensor, name: str) -> Tensor:
    """The Hessian of one image's loss by what is added to the input of a layer's only call."""
    shapes: list[Any] = []
    with bank.layers[name].register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape)):
        bank.model(image[None])

    def loss(shift: Tensor) -> Tensor:
        hook = bank.layers[name].register_forward_pre_hook(lambda _, args: (args[0] + shift.reshape(shapes[0]),))
        with hook:
            return F.cross_entropy(bank.model(image[None]), target[None])

    size = shapes[0].numel()
    return torch.func.hessian(loss)(torch.zeros(size, dtype=image.dtype)).detach().reshape(size, size)


@pytest.fixture
def double(small_bank: Any, whole: Any) -> Any:
    bank, batches = small_bank(dtype=torch.float64, images=6)
    return bank, batches, *whole(batches)


def test_product_for_all_layers_at_once_is_that_with_the_exact_hessian(double: Any) -> None:
    bank, _, images, target = double
    weights = weights_of(bank)
    with scoring(bank):
        curvature = Curvature(bank, "weight", Batch(images, target, torch.arange(6)))
        assert {variable.layer for variable in curvature.variables} == set(LAYERS)
        z = {v.layer: random_signs(place, v.value) for place, v in enumerate(curvature.variables)}
        products = curvature.products([z[v.layer] for v in curvature.variables])
    loss = loss_by_weights(bank, images, target)
    expected = torch.func.jvp(torch.func.grad(loss), (weights,), (z,))[1]
    for variable, product in zip(curvature.variables, products, strict=True):
        torch.testing.assert_close(product, expected[variable.layer])


def test_product_with_one_block_is_that_with_the_exact_block(double: Any) -> None:
    bank, _, images, target = double
    with scoring(bank):
        curvature = Curvature(bank, "weight", Batch(images, target, torch.arange(6)))
        for place, variable in enumerate(curvature.variables):
            z = random_signs(place, variable.value)
            (product,) = curvature.products([z] * len(curvature.variables), only=place)
            block = exact_block(bank, images, target, variable.layer)
            torch.testing.assert_close(product.flatten(), block @ z.flatten())


def test_trace_lies_in_its_interval_around_that_of_the_exact_hessian(double: Any) -> None:
    bank, batches, images, target = double
    score = HawqTrace(probes=200, tolerance=1e-9, chunk=2)
    traces = score.traces(bank, batches, "weight", seed=0)
    exact = {name: float(exact_block(bank, images, target, name).trace()) for name in LAYERS}
    outside = [name for name in LAYERS if abs(traces[name].mean - exact[name]) > traces[name].half_width]
    assert len(outside) <= 1, "of five intervals with 95 % each"
    for name in LAYERS:
        assert traces[name].probes == 200
        assert abs(traces[name].mean - exact[name]) <= 1.5 * traces[name].half_width
    assert traces["head"].half_width < 0.3 * exact["head"]


@pytest.mark.parametrize("name", ["stem", "head", "mix"])
def test_trace_by_an_input_is_the_mean_over_the_images(name: str, double: Any) -> None:
    bank, batches, images, target = double
    traces = HawqTrace(probes=100, tolerance=1e-9).traces(bank, batches, "input", seed=0)
    blocks = [exact_input_block(bank, image, label, name) for image, label in zip(images, target, strict=True)]
    exact = float(sum(block.trace() for block in blocks)) / len(images)
    assert abs(traces[name].mean - exact) <= 1.5 * traces[name].half_width
    assert traces[name].half_width < 0.5 * abs(exact)


def test_probes_stop_where_the_intervals_are_narrow_enough(double: Any) -> None:
    bank, batches, *_ = double
    wide, narrow = (HawqTrace(probes=400, tolerance=t).traces(bank, batches, "weight", seed=0) for t in (8.0, 2.0))
    assert wide["head"].probes < narrow["head"].probes < 400
    for traces, tolerance in ((wide, 8.0), (narrow, 2.0)):
        least = 0.01 * max(abs(trace.mean) for trace in traces.values())
        assert all(trace.half_width <= tolerance * max(abs(trace.mean), least) for trace in traces.values())


@pytest.mark.parametrize("name", LAYERS)
def test_eigenvalue_is_the_largest_of_the_exact_block(name: str, double: Any) -> None:
    bank, batches, images, target = double
    found = HawqEigenvalue(iterations=500, tolerance=1e-7).eigenvalues(bank, batches, "weight", seed=0)
    values = torch.linalg.eigvalsh(exact_block(bank, images, target, name))
    largest = values[values.abs().argmax()]
    assert found[name] == [(pytest.approx(float(largest), rel=1e-3), bank.layers[name].weight.numel())]


@pytest.mark.parametrize("name", ["stem", "head"])
def test_eigenvalue_by_an_input_is_the_mean_over_the_images(name: str, double: Any) -> None:
    bank, batches, images, target = double
    found = HawqEigenvalue(iterations=500, tolerance=1e-7).eigenvalues(bank, batches, "input", seed=0)
    total = 0.0
    for image, label in zip(images, target, strict=True):
        values = torch.linalg.eigvalsh(exact_input_block(bank, image, label, name))
        total += float(values[values.abs().argmax()])
    ((value, _),) = found[name]
    assert value == pytest.approx(total / len(images), rel=1e-3)


def test_scores_are_curvature_times_squared_error(double: Any) -> None:
    bank, batches, *_ = double
    with scoring(bank):
        power = noise_power(bank, batches, 4)
    weight = bank.layers["head"].weight.detach()
    rounded = bank.quantizers["head"]["weight"][3](weight).detach()
    assert power[Choice("head", "weight", 3)] == pytest.approx(float((rounded - weight).square().mean()))
    trace = HawqTrace(probes=8).traces(bank, batches, "weight", seed=0)["head"].mean
    scores = HawqTrace(probes=8)(bank, batches, seed=0)
    assert scores.weight["head"][3] == pytest.approx(0.5 * trace * power[Choice("head", "weight", 3)])
    ((value, size),) = HawqEigenvalue().eigenvalues(bank, batches, "weight", seed=0)["head"]
    scores = HawqEigenvalue()(bank, batches, seed=0)
    assert scores.weight["head"][3] == pytest.approx(0.5 * value * float((rounded - weight).square().sum()))
    assert size == weight.numel()
    assert all(value >= 0 for widths in (*scores.weight.values(), *scores.input.values()) for value in widths.values())


def test_attention_has_a_second_derivative(small_bank: Any) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch, self.qkv, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 24), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.patch(x).flatten(2).transpose(1, 2)
            q, k, v = self.qkv(tokens).chunk(3, dim=-1)
            return self.head(F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None]).squeeze(1).mean(1))

    bank, batches = small_bank(Attention())
    traces = HawqTrace(probes=8).traces(bank, batches, "weight", seed=0)
    assert traces["qkv"].mean != 0


def test_curvlinops_agrees(double: Any) -> None:
    curvlinops = pytest.importorskip("curvlinops", reason="curvlinops is not installed")
    from scipy.sparse.linalg import eigsh

    bank, batches, images, target = double
    traces = HawqTrace(probes=200, tolerance=1e-9).traces(bank, batches, "weight", seed=0)
    largest = HawqEigenvalue(iterations=500, tolerance=1e-7).eigenvalues(bank, batches, "weight", seed=0)
    for name in ("stem", "depthwise", "head"):
        parameters = [bank.layers[name].weight]
        data = [(images, target)]
        hessian = curvlinops.HessianLinearOperator(bank.model, nn.CrossEntropyLoss(), parameters, data)
        dense = hessian @ torch.eye(hessian.shape[0], dtype=torch.float64)
        torch.testing.assert_close(dense, exact_block(bank, images, target, name), rtol=1e-6, atol=1e-8)
        assert traces[name].mean == pytest.approx(float(dense.trace()), abs=1.5 * traces[name].half_width)
        (value,) = eigsh(hessian.to_scipy(), k=1, which="LM", return_eigenvectors=False)
        assert largest[name][0][0] == pytest.approx(float(value), rel=1e-3)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (HawqTrace, {"probes": 1}, "HawqTrace: probes must be 2 or more for an interval, got 1"),
        (HawqTrace, {"confidence": 1.0}, r"HawqTrace: confidence must be in \(0, 1\)"),
        (HawqEigenvalue, {"images": 0}, "HawqEigenvalue: iterations and images must be 1 or more"),
    ],
)
def test_options_that_do_not_exist_are_refused(make: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)
