"""The shape of a model's layers, which decides what they cost at any number of bits; read from one forward."""

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils._pytree import tree_leaves

from qtrain.costs.count import OUTSIDE_LAYERS, kind_of
from qtrain.costs.products import count_products, multiplying_layers
from qtrain.models.stored_weight import bits_as_they_are, stored_weights, weight_shape
from qtrain.nn.operations import MatMul
from qtrain.utils.calls import first_argument


@dataclass(frozen=True)
class LayerGeometry:
    """One layer that multiplies, for one image; all numbers are those of all its calls, shapes those of the first.

    ``weights`` is 0 for a weight that is stored with an earlier layer, and ``share`` are these weights as a part of
    those of all layers. ``bits_in_float`` are what the layer stores for them before they are quantized. ``inputs`` and
    ``outputs`` count elements. ``input_shape`` and ``output_shape`` have no batch axis, and are those of the first
    tensor where a layer reads or gives several. ``padding`` are the zeros
    (before, after) each axis, also where the layer computes them from the image. A layer that the forward never calls
    has no MACs, no elements and no shapes; products that no layer owns have nothing but MACs. ``calls`` says how often
    the forward calls the layer.
    """

    name: str
    kind: str
    weight_shape: tuple[int, ...] = ()
    weights: int = 0
    share: float = 0.0
    bits_in_float: int = 0
    macs: int = 0
    inputs: int = 0
    outputs: int = 0
    input_shape: tuple[int, ...] = ()
    output_shape: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    bias: bool = False
    calls: int = 0


@dataclass
class _Seen:
    """Elements that a layer read and gave, and the shapes of its first call, batch axis included."""

    calls: int = 0
    inputs: int = 0
    outputs: int = 0
    input_shape: tuple[int, ...] = ()
    output_shape: tuple[int, ...] = ()


def layer_geometries(model: nn.Module, example: Tensor) -> tuple[LayerGeometry, ...]:
    """The layers of ``model``, converted or not, in the order in which they run, for one image of ``example`` (N, ...).

    The layers are those of :func:`qtrain.costs.count.count`: convolutions, linear layers, embeddings, exposed matrix
    products, and a last one for products that no layer owns, if there are any. Raises ``ValueError`` where an operator
    of a layer is not counted.
    """
    seen = {name: _Seen() for name, _ in multiplying_layers(model)}
    with ExitStack() as stack:
        for name, module in multiplying_layers(model):
            hook = module.register_forward_hook(_watch(module, seen[name]), with_kwargs=True, prepend=True)
            stack.enter_context(hook)
        macs, outside = count_products(model, example)
    modules = dict(multiplying_layers(model))
    stored, shapes = stored_weights(modules.items()), {name: weight_shape(module) for name, module in modules.items()}
    numbers = {name: math.prod(shapes[name]) if stored[name] else 0 for name in modules}
    total = sum(numbers.values()) or 1
    images = example.shape[0]
    found = [
        LayerGeometry(
            name=name,
            kind=kind_of(modules[name]),
            weights=numbers[name],
            share=numbers[name] / total,
            bits_in_float=bits_as_they_are(stored[name]),
            weight_shape=shapes[name],
            macs=macs.get(name, 0),
            inputs=seen[name].inputs // images,
            outputs=seen[name].outputs // images,
            calls=seen[name].calls,
            **_shape(modules[name], seen[name]),
        )
        for name in (*macs, *(name for name in modules if name not in macs))
    ]
    return (*found, LayerGeometry(OUTSIDE_LAYERS, "matmul", macs=outside)) if outside else tuple(found)


def _watch(module: nn.Module, seen: _Seen) -> Callable[..., None]:
    def watch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        read = _tensors(args if isinstance(module, MatMul) else first_argument(args, kwargs))
        given = _tensors(output)
        seen.inputs += sum(tensor.numel() for tensor in read)
        seen.outputs += sum(tensor.numel() for tensor in given)
        seen.calls += 1
        seen.input_shape = seen.input_shape or next((tuple(one.shape) for one in read), ())
        seen.output_shape = seen.output_shape or next((tuple(one.shape) for one in given), ())

    return watch


def _tensors(tree: object) -> list[Tensor]:
    """The tensors in nested tuples, lists and dicts, in their order."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _shape(module: nn.Module, seen: _Seen) -> dict[str, Any]:
    found: dict[str, Any] = {"input_shape": seen.input_shape[1:], "output_shape": seen.output_shape[1:]}
    if not isinstance(module, MatMul):
        found["bias"] = getattr(module, "bias", None) is not None
    if isinstance(module, _ConvNd):
        found |= {"stride": module.stride, "dilation": module.dilation, "groups": module.groups}
        found["padding"] = _padding(module, seen)
    return found


def _padding(module: _ConvNd, seen: _Seen) -> tuple[tuple[int, int], ...]:
    """The zeros before and after each axis: the layer's own, or those that the size of its output asks for."""
    fixed = () if isinstance(module.padding, str) or getattr(module, "pad", None) is not None else module.padding
    if any(fixed) or isinstance(module, _ConvTransposeNd):
        return tuple((zeros, zeros) for zeros in fixed)
    axes = len(module.kernel_size)
    before, after = seen.input_shape[-axes:], seen.output_shape[-axes:]
    parts = zip(before, after, module.kernel_size, module.stride, module.dilation, strict=False)
    total = [max(0, (new - 1) * step + gap * (size - 1) + 1 - old) for old, new, size, step, gap in parts]
    return tuple((zeros // 2, zeros - zeros // 2) for zeros in total)
