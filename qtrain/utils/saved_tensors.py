"""How much memory a forward pass holds for the backward pass."""

from collections.abc import Iterable
from types import TracebackType
from typing import Self, final

import torch
from torch import Tensor


@final
class SavedTensors:
    """Inside, what autograd saves for a backward is counted: each storage once, and none of those of ``known`` tensors.

    ``known`` are tensors that stay in memory whatever is computed: parameters, buffers, the images. What is counted
    stays in memory as long as this object does, so that no storage takes another one's place. Compiled code is counted
    too, without being compiled again.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        self._known = {_place(tensor) for tensor in known}
        self._found: dict[int, Tensor] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._count, lambda tensor: tensor)

    def _count(self, tensor: Tensor) -> Tensor:
        if _place(tensor) not in self._known:
            self._found.setdefault(_place(tensor), tensor.detach())
        return tensor

    def __enter__(self) -> Self:
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)

    @property
    def bytes(self) -> int:
        """Bytes of all storages that were saved."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self._found.values())


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
