"""Value-aware quantization: the few largest values stay in high precision, so that the rest needs few bits."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, final

import torch
from torch import Tensor

from qtrain.functional.affine import require_finite
from qtrain.functional.indicator import above
from qtrain.functional.order_statistic import kth_magnitude
from qtrain.functional.ste import straight_through
from qtrain.quantizers.base import MakeQuantizer
from qtrain.quantizers.hooks import project
from qtrain.quantizers.wrappers.wrapper import Wrapper
from qtrain.spec import Observed, QuantSpec
from qtrain.storage.base import NumberPart, QTensor
from qtrain.storage.outliers import OutlierTensor

STORED = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def largest_values(x: Tensor, fraction: float) -> Tensor:
    """1 at the ``round(fraction n)`` largest magnitudes of ``x``, else 0: shape, memory layout and dtype of ``x``.

    There are fewer if the next magnitude equals the last one: equal magnitudes are outliers together or not at all.
    """
    count = round(fraction * x.numel())
    if count in (0, x.numel()):
        return torch.full_like(x, float(count > 0)).detach()
    return above(x.float().abs(), kth_magnitude(x, x.numel() - count)).to(x.dtype)


@final
class Outlier(Wrapper):
    """``x^ = x`` in 16 bits for the ``fraction`` of largest magnitudes, ``Q(x)`` for the rest, ``Q`` another quantizer.

    Park, Yoo, Vajda 2018, "Value-aware Quantization", arXiv 1804.07802, §3. The threshold is that of the tensor at
    hand, of a weight or of a batch of inputs. ``Q`` sees zeros in the outliers' places. A weight's range is calibrated
    on the rest; for inputs the observer decides: ``percentile`` with ``100 (1 - fraction)`` leaves the outliers out.
    ``store`` is ``float16``, which saturates at 65504, or ``bfloat16``. The gradient of an outlier is exact, the others
    have the one of ``Q``.
    """

    def __init__(
        self,
        *,
        spec: QuantSpec,
        quantizer: MakeQuantizer,
        fraction: float = 0.03,
        store: Literal["float16", "bfloat16"] = "float16",
    ) -> None:
        if not 0 <= fraction < 1:
            raise ValueError(f"Outlier: fraction must be in [0, 1), got {fraction}; 0.01 to 0.03 is usual")
        if store not in STORED:
            raise ValueError(f"Outlier: store must be one of {list(STORED)}, got {store!r}")
        super().__init__(spec=spec, quantizer=quantizer)
        self.fraction, self.stored_type = fraction, STORED[store]

    def stored(self, x: Tensor) -> Tensor:
        """``x`` as outliers are stored; without gradient."""
        largest = torch.finfo(self.stored_type).max
        return x.detach().float().clamp(-largest, largest).to(self.stored_type)

    def fake_quantize(self, x: Tensor) -> Tensor:
        outlying = largest_values(x, self.fraction)
        kept, rest = straight_through(self.stored(x).to(x.dtype), x), 1 - outlying
        result: Tensor = kept * outlying + self.inner(x * rest) * rest
        return result

    def quantize(self, x: Tensor) -> QTensor:
        require_finite(x)
        outlying = largest_values(x, self.fraction).bool()
        rest = self.inner.quantize(x.masked_fill(outlying, 0.0))
        positions = outlying.reshape(-1).nonzero()[:, 0]
        return OutlierTensor(
            codes=rest.codes,
            bits=rest.bits,
            low=rest.low,
            high=rest.high,
            dtype=x.dtype,
            decoder=replace(rest, codes=rest.codes.new_zeros(0)),
            positions=positions.to(torch.int32),
            position_bits=max((x.numel() - 1).bit_length(), 1),
            outliers=self.stored(x).reshape(-1)[positions],
        )

    @torch.no_grad()
    def calibrate_(self, observed: Observed) -> None:
        self.inner.calibrate_(self.without_outliers(observed))
        self.follow_inner_()

    def without_outliers(self, observed: Observed) -> Observed:
        """``observed`` of a weight as if it had no outliers; of an input unchanged."""
        if observed.tensor is None:
            return observed
        outlying = largest_values(observed.tensor, self.fraction).bool()
        rest = observed.tensor.masked_fill(outlying, 0.0)
        rows, others = self.granularity.flatten(rest.float()), self.granularity.flatten(~outlying)
        low, high = (end.reshape(observed.low.shape) for end in rows.aminmax(dim=1))
        mean_abs = rows.abs().sum(dim=1) / others.sum(dim=1).clamp(min=1)
        return Observed(
            # An observer that clipped harder keeps its range.
            low=torch.maximum(observed.low, low),
            high=torch.minimum(observed.high, high),
            mean_abs=mean_abs.reshape(observed.mean_abs.shape),
            tensor=rest,
        )

    def project(self, weight: Tensor) -> Tensor:
        return project(self.inner, weight)

    def stored_state(self) -> Mapping[str, NumberPart]:
        return self.inner.stored_state()
