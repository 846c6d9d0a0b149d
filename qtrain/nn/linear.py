"""Matrix product of quantized weights with quantized inputs."""

from typing import final

import torch.nn.functional as F
from torch import Tensor, nn

from qtrain.nn.base import quantized_product, without_quantizers
from qtrain.quantizers.base import Quantizer


@final
class QuantLinear(nn.Linear):
    """``Q_x(x) Q_w(W)^T + b`` in place of ``x W^T + b``; without quantizers it is ``source``, bit for bit.

    The parameters are those of ``source`` (shared, not copied), so that a state dict keeps its keys. Input
    x (..., in_features).
    """

    weight_quantizer: Quantizer | None
    input_quantizer: Quantizer | None
    tensor_quantizer: Quantizer | None
    gradient_quantizer: nn.Module | None
    held_weight: Tensor | None

    def __init__(self, *, source: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = source.in_features, source.out_features
        self.weight, self.bias = source.weight, source.bias
        without_quantizers(self)
        self.training = source.training

    def effective_weight(self) -> Tensor:
        """The weight that is multiplied, before quantization: (out_features, in_features)."""
        return self.weight

    def forward(self, input: Tensor) -> Tensor:
        return quantized_product(self, input, F.linear, self.bias)
