"""Convolutions of quantized weights with quantized inputs."""

from typing import Any, final

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from qtrain.nn.base import adopt_convolution, quantized_product
from qtrain.quantizers.base import Quantizer

_FUNCTIONS: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@final
class QuantConv(_ConvNd):
    """``conv(Q_x(x), Q_w(W'))`` in place of ``conv(x, W')``; without quantizers it is ``source``, bit for bit.

    ``source`` convolves over one, two or three axes. The parameters are its own (shared, not copied), so that a state
    dict keeps their keys (except that a gain of weight standardization moves to ``weight_transform.gain``). ``pad`` is
    applied to the quantized input, for convolutions that compute their own padding; ``weight_transform`` turns the
    stored weight into the one that is convolved, ``W'``, for weight standardization. Input x (N, C, ...).
    """

    pad: nn.Module | None
    weight_transform: nn.Module | None
    weight_quantizer: Quantizer | None
    input_quantizer: Quantizer | None
    tensor_quantizer: Quantizer | None
    gradient_quantizer: nn.Module | None
    held_weight: Tensor | None

    def __init__(
        self, *, source: _ConvNd, pad: nn.Module | None = None, weight_transform: nn.Module | None = None
    ) -> None:
        adopt_convolution(self, source, pad, weight_transform)

    def effective_weight(self) -> Tensor:
        """The weight that is convolved, before quantization: (O, I / groups, ...)."""
        return self.weight if self.weight_transform is None else self.weight_transform(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        return quantized_product(self, input, self.product, self.bias)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution of ``x`` (N, C, ...) with ``weight``, padding included, without any quantizer."""
        padding: Any = self.padding
        if self.pad is not None:
            x, padding = self.pad(x), 0
        elif self.padding_mode != "zeros":
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        convolve = _FUNCTIONS[len(self.kernel_size)]
        output: Tensor = convolve(x, weight, bias, self.stride, padding, self.dilation, self.groups)
        return output
