"""Moving weights after an optimizer step, where their quantizer asks for it."""

from __future__ import annotations

import torch
from torch import nn

from qtrain.nn import QuantConvTranspose, QuantEmbedding, QuantLinear, QuantWeighted
from qtrain.nn.conv_transpose import outputs_first
from qtrain.quantizers.hooks import Projection


@torch.no_grad()
def project_weights_(model: nn.Module) -> None:
    """Replace, in place, each weight of ``model`` whose quantizer is a ``Projection`` by what that makes of it.

    The quantizer sees the weight as it is multiplied (O, I, ...). A weight that is standardised before it is multiplied
    has no place of its own to be put back to, and stays.
    """
    for layer in model.modules():
        if not isinstance(layer, QuantWeighted) or not isinstance(layer.weight_quantizer, Projection):
            continue
        if isinstance(layer, QuantLinear | QuantEmbedding):
            layer.weight.copy_(layer.weight_quantizer.project(layer.weight))
        elif isinstance(layer, QuantConvTranspose):
            projected = layer.weight_quantizer.project(layer.effective_weight())
            layer.weight.copy_(outputs_first(projected, layer.groups))
        elif layer.weight_transform is None:
            layer.weight.copy_(layer.weight_quantizer.project(layer.weight))
