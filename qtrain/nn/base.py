"""What all quantized layers do: quantize weight and input, multiply, and let the gradient back."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from qtrain.nn.folded import FoldedWeight
from qtrain.quantizers.base import Quantizer

ProductFunction = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(quantized input, quantized weight, bias) -> output."""


class ReadsInput(Protocol):
    """What quantizes its input.

    ``tensor_quantizer`` belongs to another reader of the same tensor, which has more bits: a target that quantizes each
    tensor once lets the others read what that one gives.
    """

    input_quantizer: Quantizer | None
    tensor_quantizer: Quantizer | None


class Quantized(ReadsInput, Protocol):
    """The part of a quantized layer that is the same for all.

    ``held_weight`` is the quantized weight while several batches share it; see :mod:`qtrain.nn.held_weights`.
    """

    weight_quantizer: Quantizer | None
    gradient_quantizer: nn.Module | None
    held_weight: Tensor | None

    def effective_weight(self) -> Tensor: ...


def quantized_product(layer: Quantized, input: Tensor, product: ProductFunction, bias: Tensor | None) -> Tensor:
    """``product(Q_x(input), Q_w(W'), bias)``, whose gradient passes through the layer's gradient quantizer.

    An input quantizer with an ``output_factor`` (XNOR-Net's map of input magnitudes) multiplies the product by it
    before the bias.
    """
    weight = quantized_weight(layer)
    quantizer, x = layer.input_quantizer, input_of(layer, input)
    factor = getattr(quantizer, "output_factor", None)
    if factor is None or quantizer is None or not quantizer.enabled:
        output = product(x, weight, bias)
    else:
        output = product(x, weight, None) * factor(input, layer)
        if bias is not None:
            output = output + bias.reshape(-1, *(1 for _ in weight.shape[2:]))
    return output if layer.gradient_quantizer is None else layer.gradient_quantizer(output)


def input_of(layer: ReadsInput, input: Tensor) -> Tensor:
    """``Q_x(input)``, or ``Q_x(Q_t(input))`` where a target quantizes the tensor for another reader first."""
    x = input if layer.tensor_quantizer is None else layer.tensor_quantizer(input)
    return x if layer.input_quantizer is None else layer.input_quantizer(x)


def quantized_weight(layer: Quantized) -> Tensor:
    """``Q_w(W')``, (O, I / groups, ...), as it is multiplied.

    A weight that is rounded as if merged with the following batch norm is divided by that norm's factor afterwards.
    """
    if layer.held_weight is not None:
        return layer.held_weight
    weight = layer.effective_weight()
    if layer.weight_quantizer is not None:
        weight = layer.weight_quantizer(weight)
    transform = getattr(layer, "weight_transform", None)
    return transform.restore(weight) if isinstance(transform, FoldedWeight) else weight


def adopt_convolution(
    layer: _ConvNd, source: _ConvNd, pad: nn.Module | None, weight_transform: nn.Module | None
) -> None:
    """Give the new ``layer`` the options of ``source`` and its parameters, shared and not copied."""
    nn.Module.__init__(layer)
    for name in [*source.__constants__, "_reversed_padding_repeated_twice"]:
        if hasattr(source, name):
            setattr(layer, name, getattr(source, name))
    if pad is not None:
        layer.padding = (0,) * len(source.kernel_size)
    layer.weight, layer.bias = source.weight, source.bias
    layer.transposed, layer.output_padding = source.transposed, source.output_padding
    setattr(layer, "pad", pad)  # noqa: B010 - the stub of _ConvNd does not have it
    setattr(layer, "weight_transform", weight_transform)  # noqa: B010
    without_quantizers(layer)
    layer.training = source.training


def without_quantizers(layer: nn.Module) -> None:
    """Set the quantizers of ``layer``, and what they would give, to absent."""
    for name in ("weight_quantizer", "input_quantizer", "tensor_quantizer", "gradient_quantizer", "held_weight"):
        setattr(layer, name, None)
