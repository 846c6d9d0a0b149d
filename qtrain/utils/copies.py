"""Copies of networks."""

import copy
from typing import TypeVar

from torch import Tensor, nn

from qtrain.utils.compat import has_hooks

Network = TypeVar("Network", bound=nn.Module)


def copied(model: Network) -> Network:
    """A copy of ``model``, which shares nothing with it.

    An activation that the network keeps as an attribute is a part of a graph, of which torch makes no copy; the copy of
    the network has its values. Raises what an attribute raises that cannot be copied, such as a weight that hooks of
    its module compute.
    """
    kept = [
        value
        for module in model.modules()
        if not has_hooks(module)
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    return copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in kept})
