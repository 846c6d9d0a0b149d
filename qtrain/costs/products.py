"""Multiply-accumulates of one image: of each layer, and of the products that no layer owns.

Two counts that do not know of each other are compared. A layer's products follow from its weight and from the elements
that it maps. All products follow from the operators that torch runs, by the formulas of ``torch.utils.flop_counter``
and a few more. What is counted beyond the layers belongs to no layer: attention, for instance.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from qtrain.models.layer_kinds import LayerSpec, describe_layer
from qtrain.models.stored_weight import weights_computed_once
from qtrain.nn import QuantWeighted
from qtrain.nn.operations import MatMul
from qtrain.utils.calls import first_argument
from qtrain.utils.eval_mode import evaluating

Products = tuple[dict[str, int], int]
"""MACs of one image: by layer, in the order of the first call, and of all products outside of layers."""

aten = torch.ops.aten


def _trilinear(left: Tensor, weight: Tensor, right: Tensor) -> int:
    """``left W right`` for each output: ``left W`` first, then the product with ``right``."""
    outputs, _, inner = weight.shape
    return left.numel() // left.shape[-1] * (weight.numel() + outputs * inner)


def _attention(query: Tensor, key: Tensor, value: Tensor) -> int:
    """Both products of every query (..., L, D) with all keys (..., S, D) and values, whatever a mask leaves out."""
    return query.numel() // query.shape[-1] * key.shape[-2] * (key.shape[-1] + value.shape[-1])


FURTHER: dict[Any, Callable[..., int]] = {
    aten.mv: lambda matrix, *_: matrix.numel(),
    aten.addmv: lambda _, matrix, *__: matrix.numel(),
    aten.dot: lambda left, *_: left.numel(),
    aten.vdot: lambda left, *_: left.numel(),
    aten.addbmm: lambda _, left, right: left.numel() * right.shape[-1],
    aten._trilinear: lambda left, weight, right, *_: _trilinear(left, weight, right),
    aten.conv_tbc: lambda x, weight, _, pad=0: (len(x) + 2 * pad - len(weight) + 1) * x.shape[1] * weight.numel(),
    aten._int_mm: lambda left, right: left.numel() * right.shape[-1],
    torch.ops.higher_order.flex_attention: lambda query, key, value, *_: _attention(query, key, value),
    aten.mkldnn_rnn_layer: lambda x, w, v, *_: x.shape[0] * x.shape[1] * (w.numel() + v.numel()),
}  # fmt: skip
"""Operators that torch's counter has no formula for -> multiplications, from their arguments."""


class _Multiplications(TorchDispatchMode):
    """Inside, ``total`` counts what torch's operators multiply.

    ``FlopCounterMode`` has the same formulas, but it also asks which module each operator belongs to. For this it hooks
    every module's gradient, which fails for models that hand parameters from module to module.

    An operator on functions, such as ``torch.cond``, runs them where nobody sees what they multiply. So one without a
    formula of its own raises ``ValueError``.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kind = getattr(func, "overloadpacket", func)
        known = kind in flop_registry or kind in FURTHER
        if not known and kind is func:
            raise ValueError(
                f"cost: what torch.ops.higher_order.{kind.name()} multiplies is not counted; count a model that has "
                "the same products without it"
            )
        if not known:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        output = func(*args, **kwargs)
        if kind in FURTHER:
            self.total += FURTHER[kind](*args)
        elif kind in flop_registry:
            self.total += flop_registry[kind](*args, **kwargs, out_val=output) // 2
        return output


@dataclass
class _Call:
    """A call of a layer that has not ended: the products before it, and those of layers within it so far."""

    name: str
    begun: int
    within: int = 0


def multiplying_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every layer that multiplies or holds a matrix, once, by its first qualified name."""
    kinds = _ConvNd | nn.Linear | nn.Embedding | MatMul
    return ((name, module) for name, module in model.named_modules() if isinstance(module, kinds))


def count_products(model: nn.Module, example: Tensor) -> Products:
    """MACs of one image: by layer, in the order of the first call, and of all products outside of layers.

    Of a layer within a layer each has its own. One forward of ``example`` (N, C, H, W) in eval mode. Torch's fused
    attention, an operator of which nobody sees the parts, is switched off for it, and so is its compiler. Raises
    ``ValueError`` where an operator of a layer is not counted.
    """
    macs: dict[str, int] = {}
    running: list[_Call] = []
    products = _Multiplications()

    def begin(name: str) -> Callable[..., None]:
        return lambda *_: running.append(_Call(name, products.total))

    def end(name: str) -> Callable[..., None]:
        def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            call = running.pop()
            while call.name != name:  # one that ended in an error, which the model caught
                call = running.pop()
            counted = products.total - call.begun - call.within
            if running:
                running[-1].within += products.total - call.begun
            own = _products(module, first_argument(args, kwargs), output) if _is_plain(module) else counted
            if counted < own:
                raise ValueError(
                    f"cost: layer {name!r} multiplies {own} times, and torch's operators in it {counted} times: the "
                    "one that it runs here is not counted; count the model on the CPU, in float32"
                )
            macs[name] = macs.get(name, 0) + own

        return add

    with ExitStack() as stack:
        for name, module in multiplying_layers(model):
            stack.enter_context(module.register_forward_pre_hook(begin(name)))
            # Before the user's own hooks, which may change the output.
            stack.enter_context(module.register_forward_hook(end(name), with_kwargs=True, prepend=True))
        for module in model.modules():
            # A weight is quantized once, before any image, so the products that this takes do not count; likewise those
            # of a weight that is computed from others.
            if isinstance(module, QuantWeighted) and module.weight_quantizer is not None:
                stack.callback(setattr, module.weight_quantizer, "enabled", module.weight_quantizer.enabled)
                module.weight_quantizer.enabled = False
        for part in (evaluating(model), torch.no_grad(), weights_computed_once(model), _unfused(), products):
            stack.enter_context(part)
        model(example)
    images = example.shape[0]
    return {name: n // images for name, n in macs.items()}, (products.total - sum(macs.values())) // images


def _is_plain(module: nn.Module) -> bool:
    """Whether ``module`` multiplies as its class tells, and not in a forward of its own."""
    return isinstance(module, QuantWeighted | MatMul) or isinstance(describe_layer(module), LayerSpec)


@contextmanager
def _unfused() -> Iterator[None]:
    """Inside, torch runs its operators one by one: no fast path of attention, nothing compiled (flex attention is)."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _products(module: nn.Module, input: Tensor, output: Tensor) -> int:
    """Multiplications of one call: so many for each element of the output, or of a transposed convolution's input."""
    if isinstance(module, MatMul):
        return output.numel() * input.shape[-1]
    if isinstance(module, nn.Embedding):
        return 0
    mapped = input if isinstance(module, _ConvTransposeNd) else output
    weight = module.weight
    assert isinstance(weight, Tensor)
    return mapped.numel() * weight[0].numel()
