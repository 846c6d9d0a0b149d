"""Which elements of a tensor form a block of a block format: neighbors along one axis, the last block perhaps short.

Unlike a granularity's groups, blocks follow the tensor at hand: their number need not be known ahead, and no size has
to divide the axis.
"""

from dataclasses import dataclass
from typing import final

import torch.nn.functional as F
from torch import Tensor


@final
@dataclass(frozen=True)
class Blocks:
    """``size`` neighbors along ``axis`` are a block; a tensor that lacks this axis has its blocks along the last.

    >>> Blocks(size=32, axis=1).state_shape((8, 40, 3, 3)), Blocks(size=32).state_shape(())
    ((8, 2, 3, 3), ())
    """

    size: int
    axis: int = 1

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"Blocks: size must be at least 1, got {self.size}")

    def state_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of a state with one number for each block of a tensor of ``shape``; an incomplete block counts."""
        along = self._along(len(shape))
        return tuple(-(-n // self.size) if i == along else n for i, n in enumerate(shape))

    def largest(self, x: Tensor) -> Tensor:
        """The largest value of each block of ``x``, which holds no negative ones: state shape, dtype of ``x``."""
        if x.ndim == 0:
            return x
        along = self._along(x.ndim)
        count, size = self.state_shape(tuple(x.shape))[along], max(min(self.size, x.shape[along]), 1)
        missing = count * size - x.shape[along]
        if missing:
            x = F.pad(x, [0, 0] * (x.ndim - 1 - along) + [0, missing])
        blocks: Tensor = x.unflatten(along, (count, size))
        return blocks.amax(dim=along + 1)

    def spread(self, state: Tensor, shape: tuple[int, ...]) -> Tensor:
        """``state``, a number for each block of a tensor of ``shape``, as a tensor of that shape."""
        if not shape:
            return state
        along = self._along(len(shape))
        # Not repeat_interleave, which compiled code looks up element by element.
        members = state.unsqueeze(along + 1).expand(
            *state.shape[: along + 1], min(self.size, shape[along]), *state.shape[along + 1 :]
        )
        return members.flatten(along, along + 1).narrow(along, 0, shape[along])

    def _along(self, rank: int) -> int:
        return self.axis % rank if -rank <= self.axis < rank else rank - 1
