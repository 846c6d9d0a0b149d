"""What quantizers with levels fixed by the method have in common: tables for each width, one scale, the storage."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import final

import torch
from torch import Tensor, nn

from qtrain.functional.affine import require_finite
from qtrain.functional.learned_step import SMALLEST_SCALE
from qtrain.functional.levels import (
    Nearest,
    cells_suffice,
    fake_quantize_to_levels,
    looked_up,
    mirrored,
    nearest_level,
    searched,
)
from qtrain.quantizers.base import Quantizer, float_parts
from qtrain.spec import Granularity, Observed, QuantSpec
from qtrain.storage.base import NumberPart, QTensor
from qtrain.storage.levels import LevelTensor

_CANDIDATES = 64


def mirrored_range(bits: int, signed: bool) -> tuple[int, int]:
    """Indices of ``2^(b-1)`` magnitudes with both signs, zero once, ``[0, 2^b-2]``; without a sign ``[0, 2^b-1]``."""
    return 0, 2**bits - (2 if signed else 1)


class LevelQuantizer(Quantizer, ABC):
    """Rounds to the nearest of a table of levels in [-1, 1], or [0, 1] without a sign, times a scale (the clip).

    ``magnitudes(n)`` gives the ``2^n`` magnitudes of ``n`` bits; a signed code spends one bit on the sign. ``nearest``
    rounds to them, for methods that know a faster way than a table or a search. The tables of all ``widths`` lie in one
    buffer, so that a change of bits changes an index and no shape.
    """

    scale: Tensor
    tables: Tensor

    def __init__(
        self,
        *,
        spec: QuantSpec,
        granularity: Granularity,
        magnitudes: Callable[[int], list[float]],
        learned: bool = True,
        nearest: Nearest | None = None,
    ) -> None:
        super().__init__(spec=spec, granularity=granularity, codes=mirrored_range)
        if learned:
            self.scale = nn.Parameter(torch.ones(self.state_shape))
        else:
            self.register_buffer("scale", torch.ones(self.state_shape))
        signed = [mirrored(magnitudes(bits - 1)) for bits in self.widths]
        rows = [*(magnitudes(bits) for bits in self.widths), *signed]
        longest = max(len(row) for row in rows)
        tables = torch.tensor([row + row[-1:] * (longest - len(row)) for row in rows])
        self.register_buffer("tables", tables)
        self._nearest = nearest or (looked_up if all(map(cells_suffice, tables)) else searched)

    @abstractmethod
    def operands(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What is rounded, float32 of the shape of ``x``, and the scale that is stored, of the state shape."""

    @final
    def levels(self) -> Tensor:
        """The levels in use, (K,), the last repeated up to the longest table."""
        row = self.signed.to(torch.int64) * len(self.widths) + self.bits - self.widths.start
        return self.tables.index_select(0, row.reshape(1))[0]

    @final
    def fake_quantize(self, x: Tensor) -> Tensor:
        values, scale = self.operands(x)
        spread = self.spread(scale, x)
        return fake_quantize_to_levels(values, spread, self.levels(), self._nearest).to(x.dtype)

    @final
    def quantize(self, x: Tensor) -> QTensor:
        require_finite(x)
        values, scale = self.operands(x.detach())
        levels = self.levels()
        t = (values / self.spread(scale, x)).clamp(levels[0], levels[-1])
        return LevelTensor(
            codes=nearest_level(t, levels).to(torch.int32),
            bits=int(self.bits),
            low=int(self.code_low),
            high=int(self.code_high),
            dtype=x.dtype,
            levels=levels[: int(self.code_high) + 1].clone(),
            scale=scale.detach().clone(),
            granularity=self.granularity,
        )

    @final
    def stored_state(self) -> Mapping[str, NumberPart]:
        return float_parts(scale=self.scale)

    @final
    def reach(self, observed: Observed) -> Tensor:
        """The largest magnitude that was seen, of the state shape; 1 where that is zero."""
        highest = torch.where(self.signed, torch.maximum(observed.low.abs(), observed.high.abs()), observed.high)
        return torch.where(highest > SMALLEST_SCALE, highest, 1.0)

    @final
    def fitted(self, values: Tensor) -> Tensor:
        """The scale, out of 64 shares of each group's largest magnitude, that leaves the least squared error."""
        rows = self.granularity.flatten(values)
        largest = rows.abs().amax(dim=1, keepdim=True)
        largest = torch.where(largest > SMALLEST_SCALE, largest, 1.0)
        levels = self.levels()
        best, least = largest, torch.full_like(largest, torch.inf)
        for step in range(_CANDIDATES, 0, -1):
            scale = largest * (step / _CANDIDATES)
            near = fake_quantize_to_levels(rows, scale, levels, self._nearest)
            error = (near - rows).square().sum(dim=1, keepdim=True)
            best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
        return best.reshape(self.state_shape)
