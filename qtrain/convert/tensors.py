"""One quantizer for each tensor, as runtimes of integers want it.

A runtime stores a tensor once. Where two layers read it by different scales, it has to be kept in floating point
between. So all readers of a tensor share one quantizer. A reader with fewer bits than that one reads what that one
gives, and quantizes it again.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qtrain.convert.layers import quant_layers, quantizers_of, switched_off
from qtrain.convert.plan import LayerPlan
from qtrain.nn import Operand
from qtrain.nn.operations import Add
from qtrain.quantizers.base import Quantizer
from qtrain.utils.calls import see_input
from qtrain.utils.eval_mode import evaluating

MOVES = {
    "clone", "contiguous", "_to_copy", "_unsafe_view", "max_pool2d_with_indices", "max_pool2d", "upsample_nearest2d",
    "index_select", "constant_pad_nd", "repeat", "roll", "flip", "pixel_shuffle", "channel_shuffle",
    "native_channel_shuffle",
}  # fmt: skip
"""Operators whose output has only values of their input, and zeros: what was quantized stays so."""


class _Following(TorchDispatchMode):
    """Inside, each tensor has a number that it shares with those that only move its values, and a depth.

    The depth is the largest number of layers between the image and the tensor. A tensor is known by its memory. All
    tensors are kept, so that no memory is used twice.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._numbers: dict[int, int] = {}
        self._depths: list[int] = []
        self._kept: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)]
        output = func(*args, **(kwargs or {}))
        self._kept.append(output)
        operator = func.overloadpacket.__name__
        depth = max((self.depth(tensor) for tensor in before), default=0)
        for tensor in tree_leaves(output):
            if not isinstance(tensor, Tensor):
                continue
            if operator in MOVES or (operator == "cat" and len(before) == 1):
                self._numbers[_place(tensor)] = self.number(before[0])
            elif operator.endswith("_") or _place(tensor) not in self._numbers:  # computed in place, or new
                self._numbers[_place(tensor)] = self._new(depth)
        return output

    def number(self, tensor: Tensor) -> int:
        """What ``tensor`` shares with those that have its values."""
        place = _place(tensor)
        if place not in self._numbers:
            self._kept.append(tensor)
            self._numbers[place] = self._new(0)
        return self._numbers[place]

    def depth(self, tensor: Tensor) -> int:
        """Layers between the image and ``tensor``."""
        return self._depths[self.number(tensor)]

    def deepen(self, tensor: Tensor) -> None:
        """``tensor`` is the output of a layer."""
        self._depths[self.number(tensor)] += 1

    def _new(self, depth: int) -> int:
        self._depths.append(depth)
        return len(self._depths) - 1


@dataclass(frozen=True)
class Readings:
    """What a forward shows of the tensors that layers read.

    ``tensors`` are the layers that read one tensor, in the order of their calls; ``main`` are the operands of sums that
    come through more layers than the other one.
    """

    tensors: list[list[str]] = field(default_factory=list)
    main: set[str] = field(default_factory=set)


@torch.no_grad()
def readings(model: nn.Module, example: Tensor) -> Readings:
    """Which layers of ``model``, converted or not, read the same tensor in a forward of ``example`` (N, C, H, W)."""
    following = _Following()
    read: dict[str, int] = {}
    numbers: dict[str, list[int]] = {}
    depths: dict[str, int] = {}
    layers = quant_layers(model)

    def see(name: str, x: Tensor) -> None:
        numbers.setdefault(name, []).append(following.number(x))
        depths.setdefault(name, following.depth(x))
        read.setdefault(name, len(read))

    with ExitStack() as hooks, switched_off(quantizers_of(model).values()), evaluating(model):
        for name, layer in layers.items():
            hooks.enter_context(see_input(layer, partial(see, name)))
        for module in model.modules():
            if any(True for _ in module.parameters(recurse=False)) and not isinstance(module, Operand):
                hooks.enter_context(module.register_forward_hook(lambda _, __, output: _deepen(following, output)))
        hooks.enter_context(following)
        model(example)
    groups: dict[int, list[str]] = {}
    for name in sorted(read, key=read.__getitem__):
        for number in dict.fromkeys(numbers[name]):
            groups.setdefault(number, []).append(name)
    main = {
        f"{name}.{'left' if depths.get(f'{name}.left', 0) >= depths.get(f'{name}.right', 0) else 'right'}"
        for name, module in model.named_modules()
        if isinstance(module, Add)
    }
    return Readings(list(_joined(groups.values())), main)


def share_quantizers_(model: nn.Module, plans: Mapping[str, LayerPlan], tensors: list[list[str]]) -> None:
    """Let the layers that read one tensor share its quantizer: the first of those with the most bits.

    Only quantizers with one scale are shared, and only among those that ``plans`` make alike.
    """
    layers = quant_layers(model)
    for names in tensors:
        readers = [name for name in names if name in layers and layers[name].input_quantizer is not None]
        if len(readers) < 2:
            continue
        most = max(plans[name].bits.input for name in readers)
        owner = next(name for name in readers if plans[name].bits.input == most)
        shared = layers[owner].input_quantizer
        assert shared is not None
        if shared.state_shape:
            continue
        for name in readers:
            if plans[name].bits.input < most and not isinstance(layers[name], Operand):
                layers[name].tensor_quantizer = shared
            elif plans[name].bits.input == most and alike(plans[name], plans[owner]):
                layers[name].input_quantizer = shared


def sharing(
    plans: Mapping[str, LayerPlan], inputs: Mapping[str, Quantizer | None], tensors: Iterable[Sequence[str]]
) -> dict[str, tuple[str, ...]]:
    """The layers that :func:`share_quantizers_` gives one quantizer once they have the same bits, by the first of them.

    ``inputs`` are their input quantizers, at any bits.
    """
    found = {}
    for names in tensors:
        at = {name: inputs.get(name) for name in names}
        left = [name for name, quantizer in at.items() if quantizer is not None and not quantizer.state_shape]
        while left:
            same = [name for name in left if alike(plans[name], plans[left[0]])]
            left = [name for name in left if name not in same]
            if len(same) > 1:
                found[same[0]] = tuple(same)
    return found


def alike(plan: LayerPlan, other: LayerPlan) -> bool:
    """Whether the two layers quantize what they read in the same way, bits apart."""
    return plan.input is other.input and plan.input_observer is other.input_observer


def _joined(groups: Iterable[list[str]]) -> Iterator[list[str]]:
    """``groups`` with those joined that have a name in common: a layer that is called twice reads two tensors."""
    joined: list[dict[str, None]] = []
    for names in groups:
        common = [group for group in joined if not group.keys().isdisjoint(names)]
        merged = {name: None for group in common for name in group} | dict.fromkeys(names)
        joined = [group for group in joined if group not in common] + [merged]
    yield from map(list, joined)


def _deepen(following: _Following, output: Any) -> None:
    for tensor in tree_leaves(output):
        if isinstance(tensor, Tensor):
            following.deepen(tensor)


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
