"""The operators of ONNX on integers: quantizing, and the table of all kinds of nodes.

What is not in the table has no integer form; ``floating.py`` computes it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qtrain.deployment.integer import arithmetic, attention, moves, norms, pools, products
from qtrain.deployment.integer.fixed import WIDE, Fixed, multiplied
from qtrain.deployment.integer.values import Attributes, Operator
from qtrain.deployment.onnx.forms import along


def quantize_linear(inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    """Codes, int64: ``clamp(round(x / scale) + zero_point)``, a tie to the even number."""
    x, scale, zero = inputs
    info = torch.iinfo(zero.dtype)
    axis, dimensions = int(attributes.get("axis", 1)), len(x.shape)
    scale, offset = (along(state, axis, dimensions) for state in (scale, zero.to(torch.int64)))
    if isinstance(x, Fixed):
        numbers, bound, factor = x.numbers, x.bound, x.scale / scale.double()
        if bound.bit_length() > WIDE:  # what lies beyond all codes may be cut off, which leaves the factor more bits
            bound = min(bound, int((info.max - info.min + 1) / float(factor.min())) + 1)
            numbers = numbers.clamp(-bound, bound)
        codes = multiplied(numbers, factor, bound)
    else:
        codes = (x / scale).round().to(torch.int64)  # the image itself
    if bool(offset.any()):
        codes += offset
    return codes.clamp_(info.min, info.max)


def dequantize_linear(inputs: Sequence[Any], attributes: Attributes) -> Fixed:
    codes, scale, zero = inputs
    info = torch.iinfo(zero.dtype)
    axis = int(attributes.get("axis", 1))
    scale, offset = (along(state, axis, codes.ndim) for state in (scale, zero.to(torch.int64)))
    numbers = codes.to(torch.int64)
    if bool(offset.any()):
        numbers = numbers - offset
    # Codes of the network are known, those of an image are not.
    bound = (
        int(numbers.abs().max())
        if zero.ndim or codes.dtype != torch.int64
        else max(info.max - int(zero), int(zero) - info.min)
    )
    return Fixed(numbers, scale.double(), bound)


def greater_or_equal(inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    """1 from the threshold on, 0 below: numbers are compared with the least whole number that is not below it."""
    x, threshold = inputs
    if isinstance(x, Fixed):
        least = (threshold.double() / x.scale).ceil().to(torch.int64)
        return torch.ge(x.numbers, least).to(torch.int64)
    return torch.ge(x, threshold).to(torch.int64)


def bit_shift(inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    """Codes that are larger by a power of two."""
    codes, by = inputs
    shifted: Tensor = codes << by.to(torch.int64)
    return shifted


OPERATORS: dict[str, Operator] = {
    "Abs": arithmetic.absolute,
    "Add": arithmetic.add,
    "AveragePool": pools.average_pool,
    "BatchNormalization": arithmetic.batch_normalization,
    "BitShift": bit_shift,
    "Cast": moves.identity,
    "Clip": arithmetic.clip,
    "Concat": moves.concatenate,
    "Conv": products.convolution,
    "ConvTranspose": products.transposed_convolution,
    "DepthToSpace": moves.moved(moves.depth_to_space),
    "DequantizeLinear": dequantize_linear,
    "Div": arithmetic.divide,
    "Dropout": moves.identity,
    "Erf": arithmetic.table(torch.erf),
    "Expand": moves.moved(moves.expand),
    "Flatten": moves.moved(moves.flatten),
    "Gather": moves.moved(moves.gather),
    "Gelu": attention.gelu,
    "Gemm": products.gemm,
    "GlobalAveragePool": pools.global_average_pool,
    "GreaterOrEqual": greater_or_equal,
    "GroupNormalization": norms.group_normalization,
    "HardSigmoid": arithmetic.hard_sigmoid,
    "HardSwish": arithmetic.hard_swish,
    "Identity": moves.identity,
    "InstanceNormalization": norms.instance_normalization,
    "LayerNormalization": norms.layer_normalization,
    "LeakyRelu": arithmetic.leaky_relu,
    "MatMul": products.matmul,
    "MaxPool": pools.max_pool,
    "Mul": arithmetic.multiply,
    "Pad": moves.moved(moves.pad),
    "PRelu": arithmetic.prelu,
    "QuantizeLinear": quantize_linear,
    "ReduceMax": pools.largest,
    "ReduceMean": pools.mean,
    "Relu": arithmetic.relu,
    "Reshape": moves.moved(moves.reshape),
    "Shape": moves.shape,
    "Sigmoid": arithmetic.table(torch.sigmoid),
    "Slice": moves.moved(moves.slice_),
    "Softmax": attention.softmax,
    "Split": moves.split,
    "Squeeze": moves.moved(moves.squeeze),
    "Sub": arithmetic.subtract,
    "Tanh": arithmetic.table(torch.tanh),
    "Transpose": moves.transpose,
    "Unsqueeze": moves.moved(moves.unsqueeze),
}
"""Kind of node -> its function."""
