"""What a layer stores as its weight: the parameter, or the tensors that the weight is computed from.

The weight of a layer with weight norm, spectral norm, an orthogonal parametrization or torch's pruning is computed at
each access or each call, so that it has no place of its own in memory. What is stored, and what several layers can
share, are the originals.
"""

from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qtrain.utils.compat import weight_hooks_at_rest
from qtrain.utils.eval_mode import evaluating
from qtrain.utils.sharing import place_of


def weight_tensors(layer: nn.Module) -> tuple[Tensor, ...]:
    """The tensors that ``layer`` keeps as its weight; none where it has no weight, or that of another module.

    Of a weight that is computed these are the originals of its parametrization, or else the parameters of the layer
    itself beside its bias. A mask or the vectors of a power iteration are buffers, and stored apart.
    """
    own = layer._parameters.get("weight", layer._buffers.get("weight"))
    if own is not None:
        return (own,)
    if parametrize.is_parametrized(layer, "weight"):
        originals = layer.get_submodule("parametrizations.weight")
        return (*originals.parameters(recurse=False), *originals.buffers(recurse=False))
    if not isinstance(getattr(layer, "weight", None), Tensor):
        return ()
    return tuple(one for name, one in layer.named_parameters(recurse=False) if name.split("_")[0] != "bias")


@torch.no_grad()
def weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """The shape of the weight that ``layer`` multiplies by, also where it is computed; empty where it has none."""
    with evaluating(layer):  # a spectral norm in training mode would go on with its power iteration
        weight = getattr(layer, "weight", None)
    return tuple(weight.shape) if isinstance(weight, Tensor) else ()


def stored_weights(layers: Iterable[tuple[str, nn.Module]]) -> dict[str, tuple[Tensor, ...]]:
    """The weight tensors that each of the named ``layers`` stores itself, by its name.

    Those that several layers have with one quantizer belong to the first of them.
    """
    found, owned = {}, set[Hashable]()
    for name, layer in layers:
        keys = {(place_of(one), getattr(layer, "weight_quantizer", None)): one for one in weight_tensors(layer)}
        found[name] = tuple(one for key, one in keys.items() if key not in owned)
        owned |= keys.keys()
    return found


def bits_as_they_are(tensors: Iterable[Tensor]) -> int:
    """The bits that ``tensors`` take in their own types."""
    return sum(8 * one.element_size() * one.numel() for one in tensors)


@contextmanager
def weights_computed_once(model: nn.Module) -> Iterator[None]:
    """Inside, no call of ``model`` computes weights from others, since all are computed once at the beginning."""
    with parametrize.cached(), weight_hooks_at_rest(model):
        for module in model.modules():
            if parametrize.is_parametrized(module):
                for name, _ in module.get_submodule("parametrizations").named_children():
                    getattr(module, name)
        yield
