"""Moving high biases into the next layer, which makes the range of the activations between them smaller."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd

from qtrain.convert.fold import OutputStatistics
from qtrain.convert.graph import Skipped, called, called_once, calls, trace
from qtrain.models.layer_kinds import LayerSpec, describe_layer
from qtrain.ptq.bn_propagation import product_mean
from qtrain.utils.compat import has_hooks
from qtrain.utils.sharing import shared_tensors, why_shared

STANDARD_DEVIATIONS = 3.0

CONSTANTS_PASS = (nn.Identity, _DropoutNd, nn.Flatten, _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd)
"""Modules ``f`` with ``f(x + c) = f(x) + c`` in eval mode."""


@torch.no_grad()
def absorb_high_biases_(model: nn.Module, statistics: Mapping[str, OutputStatistics]) -> None:
    """Subtract ``c = max(0, beta - 3 gamma)`` from each bias before a ReLU, and add ``W c`` to the next, in place.

    ``relu(y) = relu(y - c) + c`` where ``y >= c``, which holds for all but one in a thousand values of a normal (Nagel
    et al. 2019, arXiv 1906.04721, §4.1.3). ``statistics`` of the layers' outputs are updated. If the next layer pads
    with zeros, ``W c`` would be wrong at the border, since the padding is not a ``relu(y)``. Such pairs are left
    unchanged and logged, and so are layers whose output does not go only through a ReLU to convolutions and linear
    layers.
    """
    graph, shared = trace(model), shared_tensors(model)
    skipped = Skipped("high bias is not absorbed")
    for node, layer in calls(graph):
        name = str(node.target)
        if name not in statistics:
            continue
        known = statistics[name]
        excess = (known.mean - STANDARD_DEVIATIONS * known.std).clamp(min=0)
        if not bool(excess.any()):
            continue
        readers = _readers(graph, node)
        reason = readers if isinstance(readers, str) else why_shared(shared, name, "bias")
        for reader in readers if reason is None else ():
            reason = reason or why_shared(shared, reader, "bias")
        if reason is not None:
            skipped.add(name, reason)
            continue
        _add_(layer, -excess)
        known.mean = known.mean - excess
        for behind in map(graph.get_submodule, readers):
            _add_(behind, product_mean(behind, behind.weight, excess))  # type: ignore[arg-type]
    skipped.log()


def _readers(graph: fx.GraphModule, node: fx.Node) -> list[str] | str:
    """The names of the layers that read ``node`` through a ReLU, or why a constant cannot be moved into them."""
    behind = _behind(graph, node)
    if any(has_hooks(called(graph, each) or nn.Identity()) for each in (node, *behind)):
        return "hooks would see other values"
    if len(behind) != 1 or not isinstance(called(graph, behind[0]), nn.ReLU) or not called_once(graph, node):
        return "its output goes elsewhere than to a ReLU"
    readers: list[str] = []
    for user in _behind(graph, behind[0]):
        module: Any = called(graph, user)
        if not isinstance(module, _ConvNd | nn.Linear) or isinstance(module, _ConvTransposeNd):
            return "what is behind its ReLU is no convolution or linear layer"
        form = describe_layer(module)
        if not isinstance(form, LayerSpec) or form.weight_transform is not None or not called_once(graph, user):
            return "the weight behind its ReLU is computed, or is used twice"
        if form.pad is not None or any(amount != 0 for amount in getattr(module, "padding", ())):
            return "the layer behind its ReLU pads with zeros"
        if has_hooks(module):
            return "hooks of the layer behind its ReLU would see other values"
        readers.append(str(user.target))
    return readers


def _behind(graph: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
    """The nodes that read ``node``, directly or through modules that let a constant pass."""
    found = []
    for user in node.users:
        module = called(graph, user)
        passes = isinstance(module, CONSTANTS_PASS) and not has_hooks(module)
        found += _behind(graph, user) if passes else [user]
    return found


def _add_(layer: Any, amount: Tensor) -> None:
    if layer.bias is None:
        layer.bias = nn.Parameter(amount.to(layer.weight), requires_grad=layer.weight.requires_grad)
    else:
        layer.bias.add_(amount.to(layer.bias))
