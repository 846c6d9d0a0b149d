"""Moving weights before or after an optimizer step, where their quantizer asks for it."""

from collections.abc import Callable, Hashable, Iterator

import torch
from torch import Tensor, nn

from qtrain.nn import QuantConvTranspose, QuantEmbedding, QuantLinear, QuantWeighted
from qtrain.nn.conv_transpose import outputs_first
from qtrain.quantizers.hooks import Partition, Projection, has_method
from qtrain.utils.sharing import place_of


def moves_weights(model: nn.Module) -> bool:
    """Whether a quantizer of ``model`` is due to move its weights, in either of the ways below."""
    for _, layer in _trained(model):
        for quantizer in layer.weight_quantizer.modules() if layer.weight_quantizer is not None else ():
            if has_method(quantizer, "project") or (has_method(quantizer, "partition_") and quantizer.due):
                return True
    return False


@torch.no_grad()
def project_weights_(model: nn.Module) -> None:
    """Replace, in place, each weight of ``model`` whose quantizer is a ``Projection`` by its projection.

    The quantizer sees the weight as it is multiplied (O, I, ...). A weight that is standardized before it is multiplied
    stays as it is, because its projection cannot be written back. A frozen weight stays too.
    """
    for _, layer in _trained(model):
        if has_method(layer.weight_quantizer, "project"):
            assert isinstance(layer.weight_quantizer, Projection)
            replace_weight_(layer, layer.weight_quantizer.project)


@torch.no_grad()
def partition_weights_(model: nn.Module) -> None:
    """Before a step: freeze the part of each weight that its quantizer, or an inner one, is due to freeze.

    Raises ``ValueError`` for a weight that is standardized before it is multiplied.
    """
    for name, layer in _trained(model):
        for quantizer in layer.weight_quantizer.modules() if layer.weight_quantizer is not None else ():
            if not has_method(quantizer, "partition_"):
                continue
            assert isinstance(quantizer, Partition)
            if quantizer.due and not replace_weight_(layer, quantizer.partition_):
                raise ValueError(
                    f"layer {name!r}: {type(quantizer).__name__}: the weight is standardized before it is multiplied, "
                    "so no part of it can be frozen; give this layer a policy with another quantizer"
                )


def _trained(model: nn.Module) -> Iterator[tuple[str, QuantWeighted]]:
    """The layers whose weight training may move; of several with one weight and one quantizer the first."""
    seen: set[Hashable] = set()
    for name, layer in model.named_modules():
        if isinstance(layer, QuantWeighted) and layer.weight.requires_grad:
            key = (place_of(layer.weight), layer.weight_quantizer)
            if key not in seen:
                seen.add(key)
                yield name, layer


@torch.no_grad()
def replace_weight_(layer: QuantWeighted, move: Callable[[Tensor], Tensor]) -> bool:
    """Apply ``move`` to the weight as it is multiplied (O, I, ...) and write it back; whether that is possible."""
    if isinstance(layer, QuantLinear | QuantEmbedding):
        layer.weight.copy_(move(layer.weight))
    elif isinstance(layer, QuantConvTranspose):
        layer.weight.copy_(outputs_first(move(layer.effective_weight()), layer.groups))
    elif layer.weight_transform is None:
        layer.weight.copy_(move(layer.weight))
    else:
        return False
    return True
