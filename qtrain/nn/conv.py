"""Two-dimensional convolution of quantised weights with quantised inputs."""

from __future__ import annotations

from typing import final

from torch import Tensor, nn

from qtrain.quantizers.base import Quantizer


@final
class QuantConv2d(nn.Conv2d):
    """``conv(Q_x(x), Q_w(W'))`` in place of ``conv(x, W')``; without quantizers it is ``source``, bit for bit.

    The parameters are those of ``source`` (shared, not copied), so that a state dict keeps their keys (but a gain of
    weight standardisation moves to ``weight_transform.gain``). ``pad`` is applied
    to the input first, for convolutions that compute their own padding; ``weight_transform`` turns the stored weight
    into the one that is convolved, ``W'``, for weight standardisation. Input x (N, C, H, W).
    """

    def __init__(
        self, *, source: nn.Conv2d, pad: nn.Module | None = None, weight_transform: nn.Module | None = None
    ) -> None:
        nn.Module.__init__(self)
        for name in [*self.__constants__, "_reversed_padding_repeated_twice"]:
            if hasattr(source, name):
                setattr(self, name, getattr(source, name))
        if pad is not None:
            self.padding = (0, 0)
        self.weight, self.bias = source.weight, source.bias
        self.pad, self.weight_transform = pad, weight_transform
        self.transposed, self.output_padding = source.transposed, source.output_padding
        self.weight_quantizer: Quantizer | None = None
        self.input_quantizer: Quantizer | None = None
        self.training = source.training

    def effective_weight(self) -> Tensor:
        """The weight that is convolved, before quantization: (O, I / groups, kh, kw)."""
        return self.weight if self.weight_transform is None else self.weight_transform(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        weight = self.effective_weight()
        if self.weight_quantizer is not None:
            weight = self.weight_quantizer(weight)
        if self.input_quantizer is not None:
            input = self.input_quantizer(input)
        if self.pad is not None:
            input = self.pad(input)
        return self._conv_forward(input, weight, self.bias)
