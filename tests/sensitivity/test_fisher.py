"""Fisher's score against gradients of single images by autograd, and against the divergence that it estimates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qtrain.convert.bank import QuantizerBank, Widths
from qtrain.nn import QuantConv
from qtrain.sensitivity.base import members
from qtrain.sensitivity.fisher import Fisher
from qtrain.sensitivity.one_layer import OneLayer
from qtrain.spec import Choice
from qtrain.utils.calls import see_input


def value(scores: Any, choice: Choice) -> float:
    return float(getattr(scores, choice.role)[choice.layer][choice.bits])


def change_of_weight(bank: QuantizerBank, choice: Choice) -> Tensor:
    weight = bank.layers[choice.layer].weight.detach()  # type: ignore[union-attr]
    return bank.quantizers[choice.layer]["weight"][choice.bits](weight).detach() - weight


@pytest.mark.parametrize("chunk", [5, 32])
def test_whole_form_of_a_weight_is_its_gradient_times_its_change_image_by_image(
    chunk: int, small_bank: Any, whole: Any
) -> None:
    bank, batches = small_bank()
    scores = Fisher(labels="data", chunk=chunk)(bank, batches, seed=0)
    images, target = whole(batches)
    for choice in bank.choices("weight"):
        weight, change = bank.layers[choice.layer].weight, change_of_weight(bank, choice)
        squares = 0.0
        for image, label in zip(images, target, strict=True):
            loss = F.cross_entropy(bank.model(image[None]), label[None])
            gradient = torch.autograd.grad(loss, weight)[0]  # of a tied weight, that of both layers
            squares += float((gradient * change).sum().square())
        expected = 0.5 * squares / len(images)
        if choice.layer == "place":  # one sum over all images, whose cross terms vanish only for random signs
            assert value(scores, choice) > 0
        else:
            assert value(scores, choice) == pytest.approx(expected, rel=1e-3), choice


@pytest.mark.parametrize("form", ["whole", "diagonal"])
def test_score_of_an_input_follows_from_gradients_image_by_image(form: Any, small_bank: Any, whole: Any) -> None:
    bank, batches = small_bank()
    scores = Fisher(labels="data", input=form)(bank, batches, seed=0)
    images, target = whole(batches)
    for choice in bank.choices("input"):
        if choice.layer == "place":
            continue
        layer, quantizer = bank.layers[choice.layer], bank.quantizers[choice.layer]["input"][choice.bits]
        squares = 0.0
        for image, label in zip(images, target, strict=True):
            read: list[Tensor] = []
            with see_input(layer, lambda x, read=read: read.append(x.detach().clone())):
                bank.model(image[None])
            changes = [quantizer(x).detach() - x for x in read]
            gradients = _gradients_of_inputs(bank, choice.layer, image, label)
            products = [g * change for g, change in zip(gradients, changes, strict=True)]
            if form == "whole":
                squares += float(sum(p.sum() for p in products) ** 2)
            else:
                squares += float(sum(p.square().sum() for p in products))
        assert value(scores, choice) == pytest.approx(0.5 * squares / len(images), rel=1e-3), choice


def _gradients_of_inputs(bank: QuantizerBank, name: str, image: Tensor, label: Tensor) -> list[Tensor]:
    """By adding a zero to each input of the layer."""
    zeros: list[Tensor] = []

    def shift(_: Any, args: Any) -> Any:
        zeros.append(torch.zeros_like(args[0], requires_grad=True))
        return (args[0] + zeros[-1],)

    with bank.layers[name].register_forward_pre_hook(shift):
        loss = F.cross_entropy(bank.model(image[None]), label[None])
    return list(torch.autograd.grad(loss, zeros))


def test_diagonal_form_of_a_weight_takes_each_output_by_itself(small_bank: Any, whole: Any) -> None:
    bank, batches = small_bank()
    scores = Fisher(labels="data", weight="diagonal")(bank, batches, seed=0)
    images, target = whole(batches)
    head, squares = bank.layers["head"], 0.0
    for image, label in zip(images, target, strict=True):
        read: list[Tensor] = []
        with see_input(head, lambda x, read=read: read.append(x.detach())):
            logits = bank.model(image[None])
        gradient = torch.autograd.grad(F.cross_entropy(logits, label[None]), logits)[0] * 4  # the net multiplies by 4
        change = read[0] @ change_of_weight(bank, Choice("head", "weight", 3)).T
        squares += float((gradient * change).square().sum())
    assert scores.weight["head"][3] == pytest.approx(0.5 * squares / len(images), rel=1e-3)


def test_labels_of_the_model_give_the_exact_fisher_matrix_in_the_mean(small_bank: Any, whole: Any) -> None:
    """``1/2 d^T J^T (diag(p) - p p^T) J d``, with the Jacobian of the logits by forward-mode differentiation."""
    bank, batches = small_bank(images=6)
    scores = Fisher(probes=400)(bank, batches, seed=1)
    images, _ = whole(batches)
    parameters = dict(bank.model.named_parameters())
    for choice in bank.choices("weight"):
        changes = {f"{name}.weight": change_of_weight(bank, choice) for name in members(bank, choice)[:1]}
        tangents = {name: changes.get(name, torch.zeros_like(p)) for name, p in parameters.items()}

        def logits(p: Any) -> Tensor:
            return torch.func.functional_call(bank.model, p, (images,), tie_weights=True)

        exact, moved = torch.func.jvp(logits, (parameters,), (tangents,))
        p = exact.softmax(1)
        expected = float(0.5 * ((p * moved.square()).sum(1) - (p * moved).sum(1).square()).mean().detach())
        assert value(scores, choice) == pytest.approx(expected, rel=0.15), choice


def test_score_is_the_divergence_where_it_is_small(small_bank: Any) -> None:
    bank, batches = small_bank(widths=Widths((8,), (8,)), dtype=torch.float64)
    scores, measured = Fisher(probes=200, input="whole")(bank, batches, seed=0), OneLayer()(bank, batches, seed=0)
    for choice in bank.choices():
        assert value(scores, choice) == pytest.approx(value(measured, choice), rel=0.2), choice


def test_same_seed_same_score_whatever_the_chunk(small_bank: Any) -> None:
    bank, batches = small_bank()
    first, again, other = (Fisher(chunk=c)(bank, batches, seed=s) for c, s in ((32, 0), (32, 0), (32, 1)))
    assert first == again != other
    small = Fisher(chunk=3)(bank, batches, seed=0)
    for choice in bank.choices():
        if choice.layer != "place":  # its sum over a chunk's images is one sample
            assert value(small, choice) == pytest.approx(value(first, choice), rel=1e-4)


def test_all_layers_and_widths_take_one_forward_of_the_model_and_one_product_for_each_weight_width(
    small_bank: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank, batches = small_bank()
    products: list[QuantConv] = []
    product = QuantConv.product
    monkeypatch.setattr(QuantConv, "product", lambda layer, *args: products.append(layer) or product(layer, *args))
    forwards: list[Tensor] = []
    with see_input(bank.model, forwards.append):
        Fisher()(bank, batches, seed=0)
    assert len(forwards) == len(batches)
    stem, widths = bank.layers["stem"], len(bank.quantizers["stem"]["weight"])
    assert products.count(stem) == len(batches) * (1 + 1 + widths)  # the forward, once more, and each width


def test_input_that_is_changed_in_place_later_is_refused(small_bank: Any) -> None:
    class InPlace(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = torch.nn.Conv2d(3, 4, 1), torch.nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            pooled = torch.tanh(self.first(x).mean((2, 3)))
            return self.head(pooled) + pooled.mul_(2)

    bank, batches = small_bank(InPlace())
    with pytest.raises(ValueError, match="the input of layer 'head' is changed in place after the layer has read it"):
        Fisher()(bank, batches, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": "true"}, "Fisher: labels must be model or data, got 'true'"),
        ({"weight": "block"}, "Fisher: weight must be whole or diagonal, got 'block'"),
        ({"probes": 0}, "Fisher: probes must be 1 or more"),
        ({"probes": 2, "labels": "data"}, "and 1 for labels=data, got 2"),
    ],
)
def test_options_that_do_not_exist_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Fisher(**options)
