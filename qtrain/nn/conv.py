"""Convolutions of quantised weights with quantised inputs, over one, two and three axes."""

from __future__ import annotations

from typing import final

from torch import Tensor, nn

from qtrain.nn.base import adopt_convolution, quantised_product
from qtrain.quantizers.base import Quantizer


@final
class QuantConv1d(nn.Conv1d):
    """As :class:`QuantConv2d` for inputs (N, C, L)."""

    pad: nn.Module | None
    weight_transform: nn.Module | None
    weight_quantizer: Quantizer | None
    input_quantizer: Quantizer | None
    gradient_quantizer: nn.Module | None

    def __init__(
        self, *, source: nn.Conv1d, pad: nn.Module | None = None, weight_transform: nn.Module | None = None
    ) -> None:
        adopt_convolution(self, source, pad, weight_transform)

    def effective_weight(self) -> Tensor:
        """The weight that is convolved, before quantization: (O, I / groups, k)."""
        return self.weight if self.weight_transform is None else self.weight_transform(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        return quantised_product(self, input, self._product, self.bias)

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x if self.pad is None else self.pad(x), weight, bias)


@final
class QuantConv2d(nn.Conv2d):
    """``conv(Q_x(x), Q_w(W'))`` in place of ``conv(x, W')``; without quantizers it is ``source``, bit for bit.

    The parameters are those of ``source`` (shared, not copied), so that a state dict keeps their keys (but a gain of
    weight standardisation moves to ``weight_transform.gain``). ``pad`` is applied to the quantised input, for
    convolutions that compute their own padding; ``weight_transform`` turns the stored weight into the one that is
    convolved, ``W'``, for weight standardisation. Input x (N, C, H, W).
    """

    pad: nn.Module | None
    weight_transform: nn.Module | None
    weight_quantizer: Quantizer | None
    input_quantizer: Quantizer | None
    gradient_quantizer: nn.Module | None

    def __init__(
        self, *, source: nn.Conv2d, pad: nn.Module | None = None, weight_transform: nn.Module | None = None
    ) -> None:
        adopt_convolution(self, source, pad, weight_transform)

    def effective_weight(self) -> Tensor:
        """The weight that is convolved, before quantization: (O, I / groups, kh, kw)."""
        return self.weight if self.weight_transform is None else self.weight_transform(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        return quantised_product(self, input, self._product, self.bias)

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x if self.pad is None else self.pad(x), weight, bias)


@final
class QuantConv3d(nn.Conv3d):
    """As :class:`QuantConv2d` for inputs (N, C, D, H, W)."""

    pad: nn.Module | None
    weight_transform: nn.Module | None
    weight_quantizer: Quantizer | None
    input_quantizer: Quantizer | None
    gradient_quantizer: nn.Module | None

    def __init__(
        self, *, source: nn.Conv3d, pad: nn.Module | None = None, weight_transform: nn.Module | None = None
    ) -> None:
        adopt_convolution(self, source, pad, weight_transform)

    def effective_weight(self) -> Tensor:
        """The weight that is convolved, before quantization: (O, I / groups, kd, kh, kw)."""
        return self.weight if self.weight_transform is None else self.weight_transform(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        return quantised_product(self, input, self._product, self.bias)

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x if self.pad is None else self.pad(x), weight, bias)
