"""``len`` of a tensor stays open to tracers, in the code of a network only and only meanwhile."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, fx, nn

from qtrain.models.lengths import open_lengths


def half(x: Tensor) -> int:
    """Code beside the network's, as a helper function of a user is."""
    return len(x) // 2


class Net(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        lists = len([x, x]) + len(torch.ones(3, 2).shape) + len(x.split(2, dim=1))
        return x.view(len(x), -1) * lists + half(x)


class Rank(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) if len(x.shape) == 4 else x


def test_a_graph_takes_the_length_of_what_it_gets() -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(len(x), -1) + half(x)

    with pytest.raises(RuntimeError, match="'len' is not supported"):
        fx.symbolic_trace(Plain())
    with open_lengths(Plain()):
        traced = fx.symbolic_trace(Plain())
    for number in (1, 2, 5):
        images = torch.rand(number, 2, 3, 3)
        assert torch.equal(traced(images), Plain()(images))
    assert "len" not in vars(sys.modules[__name__]), "afterwards all is as it was"


@pytest.mark.parametrize("net", [Net(), Rank()])
def test_what_is_no_tensor_has_the_length_that_it_had(net: nn.Module) -> None:
    """A shape's length is a rank, and that of a list of parts their number: a graph does not know these."""
    images = torch.rand(2, 4, 3, 3)
    with open_lengths(net):
        assert torch.equal(net(images), type(net)()(images))
        with pytest.raises(RuntimeError, match="'len' is not supported"):
            fx.symbolic_trace(net)
    assert torch.equal(net(images), type(net)()(images))


def test_an_error_leaves_nothing_behind() -> None:
    with pytest.raises(ZeroDivisionError), open_lengths(Net()):
        raise ZeroDivisionError
    assert "len" not in vars(sys.modules[__name__])
