"""Transposed convolutions of quantized weights with quantized inputs."""

from typing import Any, final

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from qtrain.nn.base import adopt_convolution, quantized_product
from qtrain.quantizers.base import Quantizer

_FUNCTIONS = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def outputs_first(weight: Tensor, groups: int) -> Tensor:
    """A transposed convolution's weight (I, O / groups, ...) in the layout of all others, (O, I / groups, ...)."""
    inputs, outputs, *kernel = weight.shape
    split = weight.reshape(groups, inputs // groups, outputs, *kernel)
    return split.transpose(1, 2).reshape(groups * outputs, inputs // groups, *kernel)


@final
class QuantConvTranspose(_ConvTransposeNd):
    """A transposed convolution over one, two or three axes; without quantizers it is ``source``, bit for bit.

    The parameter keeps torch's layout (I, O / groups, ...); quantizers see :meth:`effective_weight`, where output
    channels come first, so that a scale for each channel means the same everywhere. Input x (N, C, ...).
    """

    pad: nn.Module | None
    weight_transform: nn.Module | None
    weight_quantizer: Quantizer | None
    input_quantizer: Quantizer | None
    tensor_quantizer: Quantizer | None
    gradient_quantizer: nn.Module | None
    held_weight: Tensor | None

    def __init__(self, *, source: _ConvTransposeNd) -> None:
        adopt_convolution(self, source, None, None)

    def effective_weight(self) -> Tensor:
        """The weight before quantization: (O, I / groups, ...), a copy."""
        # A copy: hooks of torch's counters find no gradient function for a view of a parameter in no-grad mode.
        return outputs_first(self.weight, self.groups).clone()

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            # The exchange of the two axes within each group is its own inverse.
            return self.product(x, outputs_first(weight, self.groups), bias, output_size)

        return quantized_product(self, input, product, self.bias)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None, output_size: list[int] | None = None) -> Tensor:
        """The transposed convolution of ``x`` (N, C, ...) with ``weight`` in torch's layout, without any quantizer."""
        axes = len(self.kernel_size)
        options: tuple[Any, ...] = (self.stride, self.padding, self.dilation, self.kernel_size)
        stride, padding, dilation, kernel = (list(option) for option in options)
        extra = self._output_padding(x, output_size, stride, padding, kernel, axes, dilation)
        return _FUNCTIONS[axes](x, weight, bias, stride, padding, extra, self.groups, dilation)
