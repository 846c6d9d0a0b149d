"""Sums, products and softmax of activations as modules, so that their operands can be quantized.

Most models write these as operators in a forward. Conversion puts the modules below in their place where the config
asks for it; each :class:`Operand` is then a layer like any other: it has a name, bits, a calibration, a cost.
"""

from typing import final

import torch
from torch import Tensor, nn

from qtrain.nn.base import without_quantizers
from qtrain.quantizers.base import Quantizer


@final
class Operand(nn.Module):
    """The identity, or ``Q_x``: a place where an activation is quantized without being a layer's input."""

    weight_quantizer: Quantizer | None
    input_quantizer: Quantizer | None
    gradient_quantizer: nn.Module | None

    def __init__(self) -> None:
        super().__init__()
        without_quantizers(self)

    def forward(self, input: Tensor) -> Tensor:
        return input if self.input_quantizer is None else self.input_quantizer(input)


@final
class Add(nn.Module):
    """``Q(left) + Q(right)``: a residual sum. At high bits the residual path is a precision highway (1812.09818)."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = Operand(), Operand()

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        total: Tensor = self.left(left) + self.right(right)
        return total


@final
class MatMul(nn.Module):
    """``Q(left) @ Q(right)`` over the last two axes: one of attention's products."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = Operand(), Operand()

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return torch.matmul(self.left(left), self.right(right))


@final
class Softmax(nn.Module):
    """``Q(softmax(x))`` over ``dim``."""

    def __init__(self) -> None:
        super().__init__()
        self.output = Operand()

    def forward(self, input: Tensor, dim: int = -1) -> Tensor:
        quantized: Tensor = self.output(input.softmax(dim))
        return quantized
