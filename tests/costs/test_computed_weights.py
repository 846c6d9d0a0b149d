"""Layers whose weight is computed from other tensors cost what these take, and multiply as often as others."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import qtrain
from qtrain.costs.count import count
from qtrain.models.stored_weight import stored_weights, weight_shape, weight_tensors, weights_computed_once


def weight_norm_of_old(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(layer)


def pruned(layer: nn.Module) -> nn.Module:
    return prune.l1_unstructured(layer, "weight", 0.5)


MAKERS: dict[str, tuple[Callable[[nn.Module], nn.Module], int, int]] = {
    # a norm for each of 8 rows beside 64 numbers
    "weight norm": (parametrizations.weight_norm, 72, 0),
    # two vectors of 8 beside them
    "spectral norm": (parametrizations.spectral_norm, 64, 16),
    # the matrix to start from
    "orthogonal": (parametrizations.orthogonal, 64, 64),
    "weight norm by a hook": (weight_norm_of_old, 72, 0),
    "spectral norm by a hook": (nn.utils.spectral_norm, 64, 16),
    # a mask of 64
    "pruned": (pruned, 64, 64),
}
"""What changes a layer -> numbers that its weight is computed from, and further state; for Linear(8, 8)."""


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("batch", [1, 2])
def test_six_layers_by_hand(name: str, batch: int) -> None:
    change, stored, further = MAKERS[name]
    model = nn.Sequential(*(change(nn.Linear(8, 8)) for _ in range(6))).eval()
    # Numbers besides the weight's own that the state dict has, of whatever sizes the maker gives them.
    state = sum(tensor.numel() for tensor in model[0].state_dict().values()) - 8 - stored
    assert state == further
    cost = qtrain.cost(model, torch.rand(batch, 8), metrics=["size_bytes", "energy", "effective_bits"])
    assert [(row.name, row.weights, row.macs) for row in cost.layers] == [(str(i), 64, 64) for i in range(6)]
    assert {row.weight_storage_bits for row in cost.layers} == {32 * stored}
    assert cost.size_bytes == cost.metrics["size_bytes"].total == 6 * 4 * (stored + further + 8)
    assert cost.effective_bits == pytest.approx(cost.metrics["effective_bits"].total) == 32 * stored / 64
    # 1300 pJ for 64 bits from outside of the chip, and all else as for plain layers.
    plain = qtrain.cost(nn.Sequential(*(nn.Linear(8, 8) for _ in range(6))), torch.rand(1, 8), metrics=["energy"])
    more = 6 * (stored + further - 64) * 650e-6
    assert cost.metrics["energy"].total == pytest.approx(plain.metrics["energy"].total + more)


def test_layers_that_share_an_original_store_it_once() -> None:
    model = nn.Sequential(*(parametrizations.weight_norm(nn.Linear(8, 8, bias=False)) for _ in range(2)))
    model[1].parametrizations.weight.original1 = model[0].parametrizations.weight.original1
    cost = qtrain.cost(model, torch.rand(1, 8), metrics=["size_bytes"])
    assert [row.weight_storage_bits for row in cost.layers] == [32 * 72, 32 * 8], "the norms of the second are its own"
    assert cost.size_bytes == cost.metrics["size_bytes"].total == 4 * (72 + 8)


@pytest.mark.parametrize("change", [parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_counting_leaves_a_power_iteration_where_it_was(change: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(change(nn.Linear(8, 8))).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooks = list(model[0]._forward_pre_hooks.values())
    qtrain.cost(model, torch.rand(1, 8), metrics=["energy"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert list(model[0]._forward_pre_hooks.values()) == hooks


class Doubled(nn.Linear):
    """A weight that a property computes."""

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.latent = nn.Parameter(self.weight.detach())
        del self._parameters["weight"]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return 2 * self.latent


def test_a_weight_of_a_property_is_stored_as_the_layers_own_parameters() -> None:
    layer = Doubled()
    assert weight_tensors(layer) == (layer.latent,)
    assert weight_shape(layer) == (3, 4)
    assert count(layer, torch.rand(1, 4)).size_bytes == 4 * (12 + 3)


def test_a_layer_without_a_weight_stores_none() -> None:
    assert stored_weights([("relu", nn.ReLU())]) == {"relu": ()}
    assert weight_shape(nn.ReLU()) == ()


def test_weights_are_computed_once_and_anew_afterwards() -> None:
    layer = parametrizations.weight_norm(nn.Linear(2, 2))
    with weights_computed_once(layer):
        assert layer.weight is layer.weight
    assert layer.weight is not layer.weight
