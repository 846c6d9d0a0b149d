"""Which layers read the image, and from which layers the logits come.

Neither follows from the order of calls: a model may have a second head, several branches that begin at the image, or a
table that is looked up before the image is read. So each tensor of a forward is followed, with the layers that its
values come from.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qtrain.utils.calls import first_argument
from qtrain.utils.eval_mode import evaluating

IMAGE = ""
"""Where the image's values come from: no layer is called so."""

aten = torch.ops.aten

SHAPES_ALONE = {
    aten.empty_like, aten.zeros_like, aten.ones_like, aten.full_like, aten.rand_like, aten.randn_like,
    aten.new_empty, aten.new_zeros, aten.new_ones, aten.new_full,
}  # fmt: skip
"""Operators that read the shape of a tensor and not its values."""


@torch.no_grad()
def ends_of(model: nn.Module, names: Collection[str], example: Tensor) -> tuple[frozenset[str], frozenset[str]]:
    """Which layers among ``names`` read the image, and from which the logits come, in a forward of ``example``.

    In eval mode, and without gradient. Either may be empty: values are lost in code outside of torch.
    """
    flow = Flow()
    flow.mark(example, [IMAGE])
    with evaluating(model), flow.follow(model, names):
        logits = model(example)
    return frozenset(flow.readers), flow.origins(logits) - {IMAGE}


class Flow(TorchDispatchMode):
    """Inside, knows of each tensor from which layers its values come with no other layer between.

    A tensor is known by its memory, so that its views are known too, and what is written into a part of it.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._origins: dict[int, frozenset[str]] = {}
        self.readers: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        origins = frozenset() if func.overloadpacket in SHAPES_ALONE else self.origins((args, kwargs))
        output = func(*args, **kwargs)
        self.mark(output, origins)
        return output

    def origins(self, values: Any) -> frozenset[str]:
        """The layers from which the tensors in ``values`` come."""
        return frozenset().union(*(self._origins.get(place, frozenset()) for place in _places(values)))

    def mark(self, values: Any, names: Iterable[str]) -> None:
        """Let the tensors in ``values`` come from ``names``."""
        for place in _places(values):
            self._origins[place] = frozenset(names)

    @contextmanager
    def follow(self, model: nn.Module, names: Collection[str]) -> Iterator[None]:
        """Inside, the layers ``names`` of ``model`` are followed: ``readers`` are those that get the image."""
        handles = []
        for name in names:
            layer = model.get_submodule(name)
            if any(True for _ in layer.parameters()):  # a fixed filter is an operation like others
                handles.append(layer.register_forward_pre_hook(self._before(name), with_kwargs=True))
                handles.append(layer.register_forward_hook(self._after(name), prepend=True))
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, name: str) -> Callable[..., None]:
        def look(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if IMAGE in self.origins(first_argument(args, kwargs)):
                self.readers.add(name)

        return look

    def _after(self, name: str) -> Callable[..., None]:
        return lambda layer, args, output: self.mark(output, [name])


def _places(values: Any) -> Iterator[int]:
    for tensor in tree_leaves(values):
        if isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.numel():
            yield tensor.untyped_storage().data_ptr()
