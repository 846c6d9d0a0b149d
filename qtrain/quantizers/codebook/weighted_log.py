"""Weighted entropy for activations: levels that are even on a logarithmic scale, whose base and place are searched."""

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from qtrain.functional.affine import require_finite
from qtrain.functional.levels import bucket
from qtrain.functional.ste import straight_through
from qtrain.quantizers.base import Quantizer
from qtrain.quantizers.codebook.levels import mirrored_range
from qtrain.spec import Histogram, Observed, PerTensor, QuantSpec
from qtrain.storage.base import IntegerPart, NumberPart, QTensor
from qtrain.storage.codebook import look_up

PARTS = 16
"""Exponents are whole numbers of 16ths: a level is ``2^(e / 16)``."""
HALF_STEPS = range(1, 17)
"""Half the distance of two levels in 16ths: bases from ``2^(1/8)`` to 4."""
LOWEST, HIGHEST = -1120, 544
"""Exponents of the boundaries that are looked at: 2^-70 to 2^34."""
STATE_BITS = 12


def count_below(histogram: Histogram) -> Tensor:
    """How many magnitudes other than zero are below ``2^(e / 16)``, e from LOWEST to HIGHEST: (E,) float64.

    A bin counts as a whole, by the middle of it, as in a histogram in 16ths of an octave. ``histogram.counts`` is (B,);
    signs do not count.
    """
    of_sign = histogram.far > 0
    near, far = histogram.near[of_sign].double(), histogram.far[of_sign].double()
    counts = histogram.counts.double().reshape(-1, len(far)).sum(dim=0)
    counts[0] = 0  # zeros, and what is below 2^-32
    edge = torch.exp2(torch.arange(LOWEST, HIGHEST + 1, dtype=torch.float64, device=far.device) / PARTS)
    sums = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return sums[torch.searchsorted((near + far) / 2, edge)]


def best_log_levels(below: Tensor, levels: int) -> tuple[int, int]:
    """Exponents (of the highest level, between two levels) of the ``levels`` levels of most weighted entropy.

    Level ``k = 1 .. K`` is ``v_k = 2^((f + s (k - 1)) / 16)`` and has the magnitudes from ``v_k 2^(-s / 32)`` to
    ``v_k 2^(s / 32)``; the highest has all above, too. ``P_k`` is its share of the magnitudes other than zero, from
    ``below`` (:func:`count_below`), its importance is ``v_k`` itself. All ``s = 2, 4, .. 32`` and all ``f`` whose
    highest level has a member are tried; of equals the first is taken. Where there is one magnitude only, or none, the
    entropy is zero everywhere: then the highest level is the first above it, or 1.
    """
    total, k = below[-1], torch.arange(1, levels + 1, device=below.device)
    above = int((below < total).sum())
    best, found = 0.0, (min(above, len(below) - 1) + LOWEST if above else 0, 4)
    for half in HALF_STEPS:
        lower = torch.arange(above, device=below.device)[:, None] - half * 2 * (
            levels - k
        )  # of the highest level first
        lower = lower[lower[:, 0] >= 0]
        if len(lower) == 0:
            continue
        start = below[lower]
        share = torch.cat([start[:, 1:] - start[:, :-1], total - start[:, -1:]], dim=1) / total
        value = torch.exp2((lower + half + LOWEST).double() / PARTS)
        most, place = (-value * torch.xlogy(share, share)).sum(dim=1).max(dim=0)
        if float(most) > best:
            best, found = float(most), (int(lower[place, -1]) + half + LOWEST, 2 * half)
    return found


@final
class WeightedLog(Quantizer):
    """Zero and ``2^((top - step k) / 16)``, rounded on the logarithmic scale, where ``top`` and ``step`` are searched.

    Source: Park, Ahn, Yoo 2017, "Weighted-Entropy-Based Quantization for Deep Neural Networks" (CVPR), §4, for
    activations: the levels with the largest ``-sum I_k P_k log P_k`` of all bases ``2^(1/8), 2^(2/8), .. 4`` and of all
    places in 16ths of an octave (:func:`best_log_levels`). ``P_k`` is a level's share of the values other than zero;
    its importance ``I_k`` is its value. As in the paper the gradient passes wherever the input is above zero, also
    beyond the highest level. Levels are floats, whose products need floats or a table; bit operations count the bits of
    the codes.

    Inputs only, with an observer that keeps a histogram. The paper has inputs after a ReLU. Where calibration saw
    negative values, one bit is the sign, the levels are searched over magnitudes, and the gradient passes everywhere.
    The paper searches in each training step; here calibration does so once. A change of bits needs a new conversion.
    """

    widths = range(1, 9)
    serves = frozenset({"input"})
    switchable = False

    top: Tensor
    step: Tensor

    def __init__(self, *, spec: QuantSpec) -> None:
        super().__init__(spec=spec, granularity=PerTensor(), codes=mirrored_range)
        self.register_buffer("top", torch.tensor(0, dtype=torch.int32))
        self.register_buffer("step", torch.tensor(2, dtype=torch.int32))

    def levels(self) -> tuple[Tensor, Tensor]:
        """How many levels there are beside zero, of one sign, and the code of zero; both 0-dim."""
        half = self.code_high // 2
        return torch.where(self.signed, half, self.code_high), torch.where(self.signed, half, 0)

    def codebook(self) -> Tensor:
        """The value of each code, (2^bits,) float32; with a sign the last is not in use."""
        count, zero = self.levels()
        place = torch.arange(2**self.spec.bits, device=self.top.device) - zero
        size = torch.exp2((self.top - self.step * (count - place.abs())) / PARTS)
        return torch.where(place == 0, 0.0, place.sign() * size)

    def indices(self, x: Tensor) -> Tensor:
        """The code of each element: int64, shape and layout of ``x``."""
        count, zero = self.levels()
        place = torch.arange(1, 2**self.spec.bits, device=self.top.device)
        boundaries = torch.exp2((self.top - self.step * (count - place + 0.5)) / PARTS)
        size = bucket(x.detach().float().abs(), boundaries).minimum(count.long())
        return torch.where(x < 0, torch.where(self.signed, zero - size, 0), zero + size).long()

    def fake_quantize(self, x: Tensor) -> Tensor:
        result = look_up(self.indices(x), self.codebook(), self.granularity)
        # 0 for what is not above zero where codes are unsigned, else 1; a number, as in functional/ste.py.
        passes = torch.maximum(x.detach().sign(), self.signed.to(x.dtype))
        return straight_through(result.to(x.dtype), x * passes)

    def quantize(self, x: Tensor) -> QTensor:
        require_finite(x)
        return self.codebook_tensor(x, self.indices(x), self.codebook())

    @torch.no_grad()
    def calibrate_(self, observed: Observed) -> None:
        if observed.histogram is None:
            raise ValueError(
                "WeightedLog: needs a histogram of its input, which min_max and moving_average do not keep; take "
                "observer@quantize.input_observer=squared_error, percentile or entropy"
            )
        self.choose_sign_(observed)
        top, step = best_log_levels(count_below(observed.histogram), int(self.levels()[0]))
        self.top.fill_(top)
        self.step.fill_(step)
        self.initialized.fill_(True)

    def stored_state(self) -> Mapping[str, NumberPart]:
        exponents = {"top": self.top, "step": self.step}
        return {
            name: IntegerPart(exponent, STATE_BITS, -(2 ** (STATE_BITS - 1))) for name, exponent in exponents.items()
        }
