"""Operations on activations as modules, so that what they read can be quantized.

Most models write these in a forward. Conversion puts the modules below in their place where the config or a target asks
for it; each :class:`Operand` is then a layer like any other: it has a name, bits, a calibration, a cost.
"""

from abc import ABC
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from qtrain.nn.base import input_of, without_quantizers
from qtrain.quantizers.base import Quantizer

HARD_GATES = ("hardsigmoid", "hardswish")
"""Functions with the gate ``clip(x + 3, 0, 6) / 6``, by :attr:`Applied.function_name`."""


@final
class Operand(nn.Module):
    """The identity, or ``Q_x``: a place where an activation is quantized without being a layer's input."""

    weight_quantizer: Quantizer | None
    input_quantizer: Quantizer | None
    tensor_quantizer: Quantizer | None
    gradient_quantizer: nn.Module | None

    def __init__(self) -> None:
        super().__init__()
        without_quantizers(self)

    def forward(self, input: Tensor) -> Tensor:
        return input_of(self, input)


class Operation(nn.Module, ABC):
    """Base of the operations; ``kind`` is the name by which a config gives bits to their operands."""

    kind: str


@final
class Add(Operation):
    """``Q(left) + Q(right)``: a residual sum. At high bits the residual path is a precision highway (1812.09818)."""

    kind = "add"

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = Operand(), Operand()

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        total: Tensor = self.left(left) + self.right(right)
        return total


@final
class Multiply(Operation):
    """``Q(left) * Q(right)``, element by element: the gate of squeeze and excite, for instance."""

    kind = "multiply"

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = Operand(), Operand()

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        product: Tensor = self.left(left) * self.right(right)
        return product


@final
class MatMul(Operation):
    """``Q(left) @ Q(right)`` over the last two axes: one of attention's products."""

    kind = "matmul"

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = Operand(), Operand()

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return torch.matmul(self.left(left), self.right(right))


@final
class Softmax(Operation):
    """``Q(softmax(x))`` over ``dim``, or over that which a call gives."""

    kind = "softmax"

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim
        self.output = Operand()

    def forward(self, input: Tensor, dim: int | None = None) -> Tensor:
        quantized: Tensor = self.output(input.softmax(self.dim if dim is None else dim))
        return quantized


@final
class Concat(Operation):
    """Several tensors behind each other along ``dim``, each quantized by itself."""

    kind = "concat"

    def __init__(self, tensors: int) -> None:
        super().__init__()
        self.operands = nn.ModuleList(Operand() for _ in range(tensors))

    def forward(self, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
        return torch.cat([operand(x) for operand, x in zip(self.operands, tensors, strict=True)], dim)


@final
class NormInput(Operation):
    """``Q(x)`` before a norm that no layer takes in, which computes in floating point; the norm is no part of it."""

    kind = "norm"

    def __init__(self) -> None:
        super().__init__()
        self.input = Operand()

    def forward(self, input: Tensor) -> Tensor:
        quantized: Tensor = self.input(input)
        return quantized


@final
class Applied(Operation):
    """``f(Q(x))`` for a function or module of one tensor: a pool, an average over pixels, an activation.

    ``kind`` is ``max_pool``, ``average_pool`` or ``activation``.
    """

    def __init__(self, kind: str, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.kind = kind
        self.input = Operand()
        self.function = function

    @property
    def function_name(self) -> str:
        """What is applied, as torch's functions are called: ``sigmoid``, ``hardswish``, ``leaky_relu``."""
        named = type(self.function) if isinstance(self.function, nn.Module) else self.function
        return str(getattr(named, "__name__", self.kind)).lower().replace("leakyrelu", "leaky_relu").rstrip("_")

    def forward(self, input: Tensor, *further: Any, **options: Any) -> Tensor:
        return self.function(self.input(input), *further, **options)
