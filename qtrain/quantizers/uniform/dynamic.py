"""Dynamic quantization of inputs: the scale is computed from the batch at hand."""

from collections.abc import Mapping, Set
from dataclasses import replace
from typing import ClassVar, final

import torch
from torch import Tensor

from qtrain.functional.affine import asymmetric_scale, fake_quantize, symmetric_scale
from qtrain.functional.ranks import largest_of_ranks
from qtrain.functional.ste import expressible, straight_through
from qtrain.quantizers.base import Quantizer, Served, full_range, index_range
from qtrain.spec import Granularity, Observed, PerSample, PerTensor, PerToken, QuantSpec
from qtrain.storage.base import NumberPart, QTensor


def extremes(x: Tensor, granularity: Granularity) -> tuple[Tensor, Tensor]:
    """Lowest and highest value of each group of ``x``, float32, of ``granularity``'s state shape; 0 of empty groups."""
    shape = granularity.state_shape(tuple(x.shape))
    if x.numel() == 0:
        return x.new_zeros(shape, dtype=torch.float32), x.new_zeros(shape, dtype=torch.float32)
    low, high = granularity.flatten(x.float()).aminmax(dim=1)
    return low.reshape(shape), high.reshape(shape)


@final
class Dynamic(Quantizer):
    """``x^ = (clamp(round(x / s) + z, Qn, Qp) - z) s`` with ``s``, ``z`` from the extremes of ``x`` itself.

    Krishnamoorthi 2018, arXiv 1806.08342, §2; for inputs only. ``granularity`` says what shares a scale: ``PerTensor``
    the whole batch (in training, that of all ranks), ``PerSample`` each sample, ``PerToken`` each vector over the
    channels (its axis is taken from the spec). ``symmetric`` fixes ``z = 0``, and calibration only chooses between
    signed and unsigned codes; otherwise codes are unsigned and zero is representable. Nothing is stored. Scales count
    as constants for the gradient, which passes unchanged except for negative values under unsigned codes.
    """

    serves: ClassVar[Set[Served]] = frozenset({"input"})

    def __init__(
        self,
        *,
        spec: QuantSpec,
        granularity: Granularity = PerTensor(),  # noqa: B008 - frozen
        symmetric: bool = True,
    ) -> None:
        # There is no state. The observer only decides the sign, so the tensor is one group for it.
        super().__init__(spec=spec, granularity=PerTensor(), codes=full_range if symmetric else index_range)
        if not isinstance(granularity, PerTensor | PerSample | PerToken):
            raise ValueError(
                f"Dynamic: granularity must be tensor, sample or token, got {granularity}; "
                "the others are for weights, whose shape is known ahead"
            )
        self.sharing = PerToken(axis=spec.channel_axis) if isinstance(granularity, PerToken) else granularity
        self.symmetric = symmetric
        if not symmetric:
            self.set_range_(bits=spec.bits, signed=False)

    def scale_and_zero_point(self, x: Tensor, *, of_all_ranks: bool = False) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point of the batch ``x``, of the state shape; ``None`` as zero point for symmetric codes."""
        low, high = extremes(x.detach(), self.sharing)
        if of_all_ranks and isinstance(self.sharing, PerTensor):
            high, below = largest_of_ranks(torch.stack([high, -low])).unbind()
            low = -below
        if self.symmetric:
            return symmetric_scale(low, high, self.code_low, self.code_high), None
        return asymmetric_scale(low, high, self.code_low, self.code_high)

    def fake_quantize(self, x: Tensor) -> Tensor:
        scale, zero_point = self.scale_and_zero_point(x, of_all_ranks=self.training)
        value = fake_quantize(x.detach(), scale, self.code_low, self.code_high, zero_point)
        # The extremes lie on the range's very ends, where a clamp would halve their gradient.
        return straight_through(value, expressible(x, self.code_low) if self.symmetric else x)

    def quantize(self, x: Tensor) -> QTensor:
        return replace(self.affine_tensor(x, *self.scale_and_zero_point(x)), granularity=self.sharing)

    @torch.no_grad()
    def calibrate_(self, observed: Observed) -> None:
        if self.symmetric:
            self.choose_sign_(observed)
        self.initialized.fill_(True)

    def stored_state(self) -> Mapping[str, NumberPart]:
        return {}

    def extra_repr(self) -> str:
        return f"bits={int(self.bits)}, {self.sharing}, symmetric={self.symmetric}"
