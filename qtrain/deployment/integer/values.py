"""What flows between the operators of the integer reference.

A value is a :class:`Fixed`, codes or shapes as whole numbers (int64), or a constant of the network as floating-point
numbers, which become integers where they are used.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from qtrain.deployment.integer.fixed import Fixed, of_values

Value = Fixed | Tensor
Attributes = Mapping[str, Any]
Operator = Callable[[Sequence[Any], Attributes], Value | tuple[Value, ...]]
"""From the values of a node's inputs and its attributes to its output, or to its outputs."""


def fixed_point(value: Value) -> Fixed:
    return value if isinstance(value, Fixed) else of_values(value)


def window(attributes: Attributes, axes: int) -> tuple[list[int], list[int], list[int]]:
    """Strides, dilations, and zeros before each axis and after each."""
    if attributes.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise ValueError("automatic padding has no integer form here")
    return (
        list(attributes.get("strides", [1] * axes)),
        list(attributes.get("dilations", [1] * axes)),
        list(attributes.get("pads", [0] * 2 * axes)),
    )
