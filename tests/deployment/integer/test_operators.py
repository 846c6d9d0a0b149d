"""Each operator on integers against the same operator of torch on the numbers that they stand for."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qtrain.deployment.integer.fixed import Fixed
from qtrain.deployment.integer.operators import OPERATORS

BatchNorm = (torch.tensor([1.5, -0.5, 2.0, 0.0]), torch.tensor([0.1, 0.2, -3.0, 1.0]),
             torch.tensor([0.3, -0.2, 0.0, 1.0]), torch.tensor([0.5, 2.0, 1.0, 0.1]))  # fmt: skip


def numbers(*shape: int, seed: int = 0, scale: float | Tensor = 0.07, reach: int = 100) -> Fixed:
    drawn = torch.randint(-reach, reach + 1, shape, generator=torch.Generator().manual_seed(seed))
    return Fixed(drawn, torch.as_tensor(scale, dtype=torch.float64), reach)


def channels(*shape: int, seed: int = 0) -> Fixed:
    """As :func:`numbers`, with a scale for each channel."""
    scale = torch.linspace(0.01, 0.2, shape[1]).reshape(1, -1, *(1 for _ in shape[2:]))
    return numbers(*shape, seed=seed, scale=scale)


def value(x: Any) -> Any:
    return x.numbers.double() * x.scale if isinstance(x, Fixed) else x


IMAGE = numbers(2, 4, 6, 6)
WEIGHT = Fixed(numbers(6, 2, 3, 3, seed=1).numbers, torch.linspace(0.01, 0.05, 6, dtype=torch.float64).reshape(6, 1, 1, 1), 100)  # fmt: skip  # noqa: E501
UP = Fixed(numbers(4, 3, 2, 2, seed=2).numbers, torch.tensor(0.02, dtype=torch.float64), 100)
MATRIX = Fixed(numbers(5, 4, seed=3).numbers, torch.linspace(0.01, 0.05, 5, dtype=torch.float64).reshape(5, 1), 100)
BIAS = torch.linspace(-1, 1, 6)
WINDOW = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}

CASES: dict[str, tuple[str, list[Any], dict[str, Any], Callable[..., Tensor]]] = {
    "convolution": ("Conv", [IMAGE, WEIGHT, BIAS], {"pads": [1, 1, 1, 1], "strides": [2, 2], "group": 2},
                    lambda x, w, b: F.conv2d(x, w, b.double(), 2, 1, 1, 2)),
    "convolution with unequal padding": ("Conv", [IMAGE, WEIGHT], {"pads": [0, 1, 1, 2], "group": 2},
                                         lambda x, w: F.conv2d(F.pad(x, (1, 2, 0, 1)), w, groups=2)),
    "convolution of channels": ("Conv", [channels(2, 4, 6, 6), WEIGHT, BIAS], {"group": 2},
                                lambda x, w, b: F.conv2d(x, w, b.double(), groups=2)),
    "transposed convolution": ("ConvTranspose", [IMAGE, UP], {"strides": [2, 2], "group": 2},
                               lambda x, w: F.conv_transpose2d(x, w, stride=2, groups=2)),
    "gemm": ("Gemm", [numbers(3, 4), MATRIX, BIAS[:5]], {"transB": 1}, lambda x, w, b: F.linear(x, w, b.double())),
    "matmul": ("MatMul", [numbers(3, 4), numbers(4, 2, seed=5)], {}, torch.matmul),
    "sum of two scales": ("Add", [IMAGE, numbers(2, 4, 6, 6, seed=4, scale=0.003)], {}, torch.add),
    "sum of channels": ("Add", [channels(2, 4, 6, 6), channels(2, 4, 6, 6, seed=9)], {}, torch.add),
    "sum with a constant": ("Add", [IMAGE, torch.tensor(1.3)], {}, torch.add),
    "difference": ("Sub", [torch.tensor(1.0), IMAGE], {}, torch.sub),
    "product": ("Mul", [IMAGE, numbers(2, 4, 1, 1, seed=6, scale=0.01)], {}, torch.mul),
    "product with negative constants": ("Mul", [IMAGE, torch.tensor([1.0, -2.0, 0.0, 0.5]).reshape(4, 1, 1)], {},
                                        torch.mul),
    "quotient by a constant": ("Div", [IMAGE, torch.tensor(3.0)], {}, torch.div),
    "batch norm": ("BatchNormalization", [IMAGE, *BatchNorm], {"epsilon": 1e-3},
                   lambda x, g, b, m, v: F.batch_norm(x, m.double(), v.double(), g.double(), b.double(), eps=1e-3)),
    "relu": ("Relu", [channels(2, 4, 6, 6)], {}, F.relu),
    "leaky relu": ("LeakyRelu", [IMAGE], {"alpha": 0.1}, lambda x: F.leaky_relu(x, 0.1)),
    "clip": ("Clip", [IMAGE, torch.tensor(-0.73), torch.tensor(2.15)], {}, lambda x, a, b: x.clamp(float(a), float(b))),
    "hard sigmoid": ("HardSigmoid", [IMAGE], {"alpha": 1 / 6, "beta": 0.5}, F.hardsigmoid),
    "hard swish": ("HardSwish", [IMAGE], {}, F.hardswish),
    "sigmoid": ("Sigmoid", [IMAGE], {}, torch.sigmoid),
    "tanh": ("Tanh", [IMAGE], {}, torch.tanh),
    "erf": ("Erf", [IMAGE], {}, torch.erf),
    "gelu": ("Gelu", [IMAGE], {}, F.gelu),
    "gelu with a tanh": ("Gelu", [IMAGE], {"approximate": "tanh"}, lambda x: F.gelu(x, approximate="tanh")),
    "softmax": ("Softmax", [IMAGE], {"axis": -1}, lambda x: x.softmax(-1)),
    "softmax of large numbers over channels": ("Softmax", [numbers(2, 4, 6, 6, scale=3e5)], {"axis": 1},
                                               lambda x: x.softmax(1)),
    "softmax of small numbers": ("Softmax", [numbers(2, 4, 64, scale=1e-7)], {}, lambda x: x.softmax(-1)),
    "layer norm": ("LayerNormalization", [IMAGE, torch.linspace(-1, 2, 6), torch.linspace(-1, 1, 6)], {},
                   lambda x, g, b: F.layer_norm(x, (6,), g.double(), b.double())),
    "group norm": ("GroupNormalization", [IMAGE, torch.linspace(-1, 2, 4), torch.linspace(-1, 1, 4)],
                   {"num_groups": 2, "epsilon": 1e-3},
                   lambda x, g, b: F.group_norm(x, 2, g.double(), b.double(), eps=1e-3)),
    "group norm with a factor for each group": (
        "GroupNormalization", [IMAGE, torch.tensor([0.5, -2.0]), torch.tensor([1.0, 0.0])], {"num_groups": 2},
        lambda x, g, b: F.group_norm(x, 2, g.double().repeat_interleave(2), b.double().repeat_interleave(2))),
    "instance norm": (
        "InstanceNormalization", [channels(2, 4, 6, 6), torch.linspace(-1, 2, 4), torch.linspace(-1, 1, 4)],
        {"epsilon": 1e-3}, lambda x, g, b: F.instance_norm(x, weight=g.double(), bias=b.double(), eps=1e-3)),
    "layer norm over two axes": ("LayerNormalization", [IMAGE, torch.ones(6, 6)], {"axis": 2, "epsilon": 1e-2},
                                 lambda x, g: F.layer_norm(x, (6, 6), g.double(), eps=1e-2)),
    "layer norm of numbers smaller than its epsilon": (
        "LayerNormalization", [numbers(2, 96, scale=1e-6), torch.ones(96)], {"epsilon": 1e-6},
        lambda x, g: F.layer_norm(x, (96,), g.double(), eps=1e-6)),
    "matmul with a weight": ("MatMul", [IMAGE, OPERATORS["Transpose"]([numbers(5, 6, scale=torch.linspace(
        0.01, 0.05, 5, dtype=torch.float64).reshape(5, 1))], {"perm": (1, 0)})], {}, torch.matmul),
    "matmul of wide numbers": ("MatMul", [numbers(2, 3, 40, scale=1e-7, reach=2**30), numbers(
        2, 40, 3, seed=5, scale=1e-9, reach=2**33)], {}, torch.matmul),
    "max pool": ("MaxPool", [IMAGE], WINDOW, lambda x: F.max_pool2d(x, 3, 2, 1)),
    "average pool": ("AveragePool", [IMAGE], WINDOW | {"count_include_pad": 1}, lambda x: F.avg_pool2d(x, 3, 2, 1)),
    "average pool without its padding": ("AveragePool", [IMAGE], WINDOW,
                                         lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)),
    "mean": ("ReduceMean", [IMAGE, torch.tensor([2, 3])], {"keepdims": 0}, lambda x, _: x.mean(dim=(2, 3))),
    "global average": ("GlobalAveragePool", [channels(2, 4, 6, 6)], {}, lambda x: x.mean(dim=(2, 3), keepdim=True)),
    "concatenation": ("Concat", [IMAGE, numbers(2, 3, 6, 6, seed=7, scale=0.5)], {"axis": 1},
                      lambda *x: torch.cat(x, dim=1)),
    "reshape": ("Reshape", [IMAGE, torch.tensor([0, -1, 12])], {}, lambda x, _: x.reshape(2, -1, 12)),
    "flatten": ("Flatten", [IMAGE], {}, lambda x: x.flatten(1)),
    "transpose": ("Transpose", [channels(2, 4, 6, 6)], {"perm": [0, 2, 3, 1]}, lambda x: x.permute(0, 2, 3, 1)),
    "slice": ("Slice", [IMAGE, torch.tensor([1]), torch.tensor([2**63 - 1]), torch.tensor([3]), torch.tensor([2])], {},
              lambda x, *_: x[..., 1::2]),
    "slice backwards": (
        "Slice", [IMAGE, torch.tensor([-1]), torch.tensor([-(2**63)]), torch.tensor([2]), torch.tensor([-2])], {},
        lambda x, *_: x.flip(2)[:, :, ::2]),
    "reflected padding": ("Pad", [IMAGE, torch.tensor([0, 0, 1, 2, 0, 0, 3, 0])], {"mode": "reflect"},
                          lambda x, _: F.pad(x, (2, 0, 1, 3), mode="reflect")),
    "repeated edges": ("Pad", [IMAGE, torch.tensor([0, 0, 1, 2, 0, 0, 3, 0])], {"mode": "edge"},
                       lambda x, _: F.pad(x, (2, 0, 1, 3), mode="replicate")),
    "depth to space": ("DepthToSpace", [channels(2, 8, 3, 2)], {"blocksize": 2, "mode": "CRD"},
                       lambda x: F.pixel_shuffle(x, 2)),
    "depth to space, block first": (
        "DepthToSpace", [numbers(2, 8, 3, 2)], {"blocksize": 2},
        lambda x: F.pixel_shuffle(x.unflatten(1, (4, 2)).transpose(1, 2).flatten(1, 2), 2)),
    "magnitude": ("Abs", [channels(2, 4, 6, 6)], {}, torch.abs),
    "slopes of channels": ("PRelu", [channels(2, 4, 6, 6), torch.tensor([0.25, -0.5, 0.0, 3.0]).reshape(4, 1, 1)], {},
                           lambda x, s: F.prelu(x, s.double().flatten())),
    "largest": ("ReduceMax", [channels(2, 4, 6, 6), torch.tensor([1])], {"keepdims": 0}, lambda x, _: x.amax(1)),
    "padding": ("Pad", [IMAGE, torch.tensor([0, 1, 0, 0, 0, 2, 0, 0])], {}, lambda x, _: F.pad(x, (0, 0, 0, 0, 1, 2))),
    "gather": ("Gather", [IMAGE, torch.tensor([2, 0])], {"axis": 1}, lambda x, i: x[:, i]),
    "squeeze": ("Squeeze", [numbers(2, 4, 1, 1), torch.tensor([2, 3])], {}, lambda x, _: x.squeeze(-1).squeeze(-1)),
    "unsqueeze": ("Unsqueeze", [numbers(2, 4), torch.tensor([1])], {}, lambda x, _: x.unsqueeze(1)),
    "expand": ("Expand", [numbers(2, 1, 4), torch.tensor([2, 3, 4])], {}, lambda x, _: x.expand(2, 3, 4)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_operator_on_integers_gives_what_floating_point_gives(case: str) -> None:
    kind, inputs, attributes, torch_form = CASES[case]
    found = OPERATORS[kind](inputs, attributes)
    expected = torch_form(*map(value, inputs))
    assert isinstance(found, Fixed)
    assert found.numbers.dtype == torch.int64
    assert int(found.numbers.abs().max()) <= found.bound
    torch.testing.assert_close(value(found), expected.double(), rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize(
    ("inputs", "attributes", "sizes"),
    [([IMAGE, torch.tensor([1, 3])], {"axis": 1}, [1, 3]), ([IMAGE], {"axis": -1, "num_outputs": 4}, [2, 2, 2])],
)
def test_split_gives_all_parts(inputs: list[Any], attributes: dict[str, Any], sizes: list[int]) -> None:
    found = OPERATORS["Split"](inputs, attributes)
    expected = value(IMAGE).split(sizes, dim=attributes["axis"])
    assert isinstance(found, tuple) and len(found) == len(expected)
    for part, numbers in zip(found, expected, strict=True):
        torch.testing.assert_close(value(part), numbers)


def test_sums_beyond_32_bits_are_refused() -> None:
    wide = Fixed(torch.full((1, 4), 2**16), torch.tensor(1.0, dtype=torch.float64), 2**16)
    with pytest.raises(OverflowError, match="which 32 bits do not hold"):
        OPERATORS["Gemm"]([wide, Fixed(torch.full((1, 4), 2**14), wide.scale, 2**14)], {"transB": 1})


def test_quotient_of_activations_has_no_integer_form() -> None:
    with pytest.raises(ValueError, match="a quotient of two activations has no integer form"):
        OPERATORS["Div"]([IMAGE, IMAGE], {})
