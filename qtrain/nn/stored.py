"""What a model's file holds: the codes of its weights, the state of its input quantizers, and all else as it is.

The cost report counts by this list, and the packed student is written by it, so that the two agree.
"""

from collections.abc import Hashable
from dataclasses import dataclass

from torch import Tensor, nn

from qtrain.nn import QuantLayer, QuantWeighted
from qtrain.quantizers.base import Quantizer
from qtrain.utils.sharing import distinct, place_of

COUNTERS = "num_batches_tracked"
"""State of batch norm that only training reads; it is not stored."""


@dataclass(frozen=True)
class StoredParts:
    """What is stored of a model, by qualified name.

    ``weights`` are the layers whose weight is stored as codes, ``tied`` further ones with the weight and the
    quantizer of one of these, by its name. ``inputs`` are the input quantizers by the layer's name; ``shared_inputs``
    are further layers with one of these, by the name of its layer, and ``tensors`` those that read what one of these
    gives before they quantize it themselves. ``plain`` is the rest of the state dict, a tensor that several modules
    share once; batch norm's counters are left out.
    """

    weights: dict[str, QuantWeighted]
    tied: dict[str, str]
    inputs: dict[str, Quantizer]
    shared_inputs: dict[str, str]
    tensors: dict[str, str]
    plain: dict[str, Tensor]


def stored_parts(model: nn.Module) -> StoredParts:
    """What is stored of ``model``, converted or not."""
    weights: dict[str, QuantWeighted] = {}
    tied: dict[str, str] = {}
    inputs: dict[str, Quantizer] = {}
    shared: dict[str, str] = {}
    owners: dict[Quantizer, str] = {}
    first: dict[tuple[Hashable, int], str] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, QuantWeighted) and layer.weight_quantizer is not None:
            owner = first.setdefault((place_of(layer.weight), id(layer.weight_quantizer)), name)
            if owner == name:
                weights[name] = layer
            else:
                tied[name] = owner
        if isinstance(layer, QuantLayer) and layer.input_quantizer is not None:
            owner = owners.setdefault(layer.input_quantizer, name)
            if owner == name:
                inputs[name] = layer.input_quantizer
            else:
                shared[name] = owner
    tensors = {
        name: owners[layer.tensor_quantizer]
        for name, layer in model.named_modules()
        if isinstance(layer, QuantLayer) and layer.tensor_quantizer is not None
    }
    return StoredParts(weights, tied, inputs, shared, tensors, distinct(_plain_state(model, quantized=True)))


def full_precision_state(model: nn.Module) -> dict[str, Tensor]:
    """What would be stored of ``model`` without its quantizers."""
    return distinct(_plain_state(model, quantized=False))


def _plain_state(model: nn.Module, *, quantized: bool) -> dict[str, Tensor]:
    """The state dict without quantizers and counters; ``quantized``: without the weights that are stored as codes."""
    skipped: list[str] = []
    coded: set[str] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantLayer):
            prefix = f"{name}." if name else ""
            skipped += [f"{prefix}{place}_quantizer." for place in ("weight", "input", "tensor", "gradient")]
            if quantized and module.weight_quantizer is not None:
                skipped.append(f"{prefix}weight_transform.")
                coded.add(f"{prefix}weight")
    return {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if isinstance(tensor, Tensor)
        and name not in coded
        and not name.startswith(tuple(skipped))
        and not name.endswith(COUNTERS)
    }
