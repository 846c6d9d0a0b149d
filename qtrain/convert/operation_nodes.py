"""Which nodes of a traced forward are operations on activations that can be quantized."""

import builtins
import operator
from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from qtrain.convert.own_graph import NUMBER

KINDS = ("add", "multiply", "matmul", "softmax", "concat", "max_pool", "average_pool", "activation", "norm")
"""Kinds of operations, as ``quantize.operations`` and a target name them."""

PAIRS = ("add", "multiply", "matmul")
"""Kinds with two operands."""

APPLIED = ("max_pool", "average_pool", "activation")
"""Kinds that apply a function to one tensor."""

_NAMES: Mapping[str, str] = {
    "add": "add", "iadd": "add", "add_": "add",
    "mul": "multiply", "imul": "multiply", "mul_": "multiply", "multiply": "multiply",
    "matmul": "matmul", "bmm": "matmul",
    "softmax": "softmax",
    "cat": "concat", "concat": "concat", "concatenate": "concat",
    "max_pool2d": "max_pool", "_max_pool2d": "max_pool",
    "avg_pool2d": "average_pool", "adaptive_avg_pool2d": "average_pool", "mean": "average_pool",
    **dict.fromkeys((
        "sigmoid", "sigmoid_", "hardsigmoid", "silu", "hardswish", "gelu", "tanh", "tanh_", "mish", "elu", "leaky_relu",
        "softplus",
    ), "activation"),
}  # fmt: skip
"""The name of a function or method of torch, or of Python's operators -> kind."""

MODULES: Mapping[type[nn.Module], str] = {
    nn.Softmax: "softmax", nn.MaxPool2d: "max_pool", nn.AvgPool2d: "average_pool", nn.AdaptiveAvgPool2d: "average_pool",
    **dict.fromkeys((
        nn.Sigmoid, nn.Hardsigmoid, nn.SiLU, nn.Hardswish, nn.GELU, nn.Tanh, nn.Mish, nn.ELU, nn.LeakyReLU, nn.Softplus,
    ), "activation"),
}  # fmt: skip
"""Modules of torch that are an operation by themselves -> kind. ReLU is none: runtimes merge it into the layer."""

OPERANDS = ("input", "other", "mat2")
"""Names by which torch's functions and methods take what they add, multiply or normalize."""

PIXELS = ([2, 3], [-2, -1], [3, 2], [-1, -2])
"""The axes over which a mean is an average over pixels."""


def kind_of(node: fx.Node) -> str | None:
    """Which operation on activations ``node`` is.

    The operands must be computed tensors: no parameters, no numbers, and nothing computed from a tensor's shape.
    """
    kind = named_kind(node)
    if kind in PAIRS:
        operands = [a for a in arguments_of(node)[:2] if isinstance(a, fx.Node) and a.op != "get_attr"]
        plain = len(operands) == 2 and not set(node.kwargs) - set(OPERANDS)
        return kind if plain and not any(is_number(operand) for operand in operands) else None
    if kind == "concat":
        if is_given_list(node):
            return kind
        tensors = tensors_of(node)
        return (
            kind if len(tensors) > 1 and all(isinstance(x, fx.Node) and x.op != "get_attr" for x in tensors) else None
        )
    if kind in APPLIED and not (isinstance(first := first_of(node), fx.Node) and first.op != "get_attr"):
        return None
    if kind == "average_pool" and not _averages_pixels(node):
        return None
    return kind


def named_kind(node: fx.Node) -> str | None:
    """The kind of operation that the function or method has which ``node`` calls, whatever it is called with."""
    if node.op == "call_function":
        module = getattr(node.target, "__module__", "") or ""
        return _NAMES.get(_raw_name(node)) if module.startswith(("torch", "_operator", "operator")) else None
    return _NAMES.get(_raw_name(node)) if node.op == "call_method" else None


def name_of(node: fx.Node) -> str:
    """The name of the function or method that ``node`` calls, without what says that it computes in place."""
    name = _raw_name(node).strip("_")
    return {"iadd": "add", "imul": "mul", "isub": "sub", "itruediv": "truediv"}.get(name, name)


def arguments_of(node: fx.Node) -> tuple[Any, ...]:
    """What ``node`` works on, by its place or by its name."""
    return (*node.args, *(node.kwargs[name] for name in OPERANDS if name in node.kwargs))


def first_of(node: fx.Node) -> Any:
    """The tensor that ``node`` works on."""
    return node.args[0] if node.args else node.kwargs.get("input")


def is_concat(node: fx.Node) -> bool:
    """Whether ``node`` concatenates tensors, of whatever origin."""
    return node.op == "call_function" and _NAMES.get(_raw_name(node)) == "concat"


def is_given_list(node: fx.Node) -> bool:
    """Whether ``node`` concatenates a list that its module was given, whose length is not known there."""
    given = node.args[0] if node.args else node.kwargs.get("tensors")
    return is_concat(node) and isinstance(given, fx.Node)


def tensors_of(node: fx.Node) -> list[Any]:
    """The tensors that ``node``, a concatenation, puts behind each other."""
    given = node.args[0] if node.args else node.kwargs.get("tensors", ())
    return list(given) if isinstance(given, list | tuple) else []


def is_number(value: Any) -> bool:
    """Whether ``value`` is a number, or a node that computes one from shapes, and not a tensor."""
    if not isinstance(value, fx.Node):
        return not isinstance(value, list | tuple) or all(is_number(one) for one in value)
    if value.op == "get_attr":
        return bool(value.meta.get(NUMBER))
    if value.op == "call_function" and value.target is builtins.getattr:
        return value.args[1] in ("shape", "ndim", "dtype", "device")
    if value.op == "call_method":
        return value.target in ("size", "dim", "numel", "stride", "item")
    if value.op == "call_function" and value.target is operator.getitem:
        return is_number(value.args[0])
    if value.op == "call_function" and getattr(value.target, "__module__", "") in ("_operator", "math", "builtins"):
        return all(is_number(one) for one in value.args)
    return False


def _raw_name(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_method" else str(getattr(node.target, "__name__", ""))


def _averages_pixels(node: fx.Node) -> bool:
    """Whether ``node`` is a pool over windows, or the mean over all pixels."""
    if _raw_name(node) != "mean":
        return True
    axes = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis"))
    return isinstance(axes, list | tuple) and list(axes) in PIXELS
