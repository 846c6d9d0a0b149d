"""What a transformer adds to a convolutional network: softmax and GELU, with integers; its norms are in ``norms``.

The shifts of softmax depend on the row at hand, as those of block floating point do.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qtrain.deployment.integer.arithmetic import multiply, table
from qtrain.deployment.integer.fixed import Fixed, multiplied, uniform
from qtrain.deployment.integer.roots import FRACTION, moved, reciprocal
from qtrain.deployment.integer.values import Attributes, Operator, Value, fixed_point

_HALF = FRACTION // 2
_NEGLIGIBLE = 40
"""Halvings after which an exponential counts as 0: its share of the largest is below ``2^-40``."""


def softmax(inputs: Sequence[Any], attributes: Attributes) -> Fixed:
    """``2^-a / sum 2^-a`` with ``a = (max x - x) log2 e``: a shift for the whole part of ``a``, tables for the rest.

    I-BERT (arXiv 2101.01321, §3.4) splits the exponential so too, with a polynomial of degree 2 in place of the tables.
    The exponentials have 30 bits behind the point, and so have the results.
    """
    x, axis = uniform(fixed_point(inputs[0])), int(attributes.get("axis", -1))
    unit = x.scale * math.log2(math.e)  # of the exponent
    below = x.numbers.amax(dim=axis, keepdim=True) - x.numbers
    limit = min(2 * x.bound, int(_NEGLIGIBLE / float(unit)) + 1)
    exponent = multiplied(below.clamp(max=limit), unit * 2**FRACTION, limit)
    whole, high, low = exponent >> FRACTION, (exponent >> _HALF) % 2**_HALF, exponent % 2**_HALF
    powers = moved(_COARSE[high] * _FINE[low], (FRACTION + whole).clamp(max=62))
    total, places = reciprocal(powers.sum(dim=axis, keepdim=True))
    return Fixed(moved(powers * total, places), torch.tensor(2.0**-FRACTION, dtype=torch.float64), 2**FRACTION + 2**8)


def gelu(inputs: Sequence[Any], attributes: Attributes) -> Value:
    """``x Phi(x)``: the factor, exact or the one with a tanh, is a table."""
    x = fixed_point(inputs[0])
    factor = _GELU_FACTORS[attributes.get("approximate", "none")]
    return multiply([x, factor([x], {})], {})


def _normal(x: Tensor) -> Tensor:
    return (1 + torch.erf(x / math.sqrt(2))) / 2


def _near_normal(x: Tensor) -> Tensor:
    inner: Tensor = math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)
    return (1 + inner.tanh()) / 2


_GELU_FACTORS: dict[str, Operator] = {"none": table(_normal), "tanh": table(_near_normal)}


def _powers(step: float) -> Tensor:
    """``2^(-i step)`` with 30 bits behind the point, for 15 bits of ``i``."""
    powers: Tensor = torch.exp2(torch.arange(2**_HALF, dtype=torch.float64) * -step) * 2**FRACTION
    return powers.round().to(torch.int64)


_COARSE, _FINE = _powers(2.0**-_HALF), _powers(2.0**-FRACTION)
