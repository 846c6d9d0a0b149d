"""Incremental quantization: a growing part of the weight is quantized for good while the rest makes up for it."""

from collections.abc import Mapping
from typing import Literal, final

import torch
from torch import Tensor

from qtrain.functional.partition import largest_first
from qtrain.functional.random import keyed_uniform
from qtrain.quantizers.base import MakeQuantizer
from qtrain.quantizers.hooks import Rate, checked_share, project, rate_at
from qtrain.quantizers.wrappers.wrapper import Wrapper
from qtrain.spec import Observed, QuantSpec
from qtrain.storage.base import NumberPart, QTensor
from qtrain.utils.eval_mode import evaluating


@final
class Incremental(Wrapper):
    """A ``share`` of each layer's weights is quantized and frozen, the rest is real and trains (arXiv 1702.03044).

    Zhou et al. 2017, INQ, §2.2 and algorithm 1, around any quantizer ``Q``: each time that ``share``, a number in
    [0, 1] or a schedule that rises to 1, has grown, the largest of the real weights (``by: magnitude``, the paper's
    pruning-inspired partition) or any of them (``by: random``) are set to ``Q(w)``. From then on they have no
    gradient, and whatever moves them, decay or momentum, is undone after each step. In training the rest of the weight
    is not quantized; in eval mode all is ``Q(w)``, of which the frozen ones are fixed points.

    So that codes of different times decode alike, ``Q`` does not learn, its bits cannot change, and it must be a
    function of single weights: calibration refuses one that looks at the whole tensor (TWN, DoReFa, a normalizing
    APoT). INQ's own is ``power_of_two`` with its ``scale: power_of_two``.
    """

    serves = frozenset({"weight"})

    frozen: Tensor
    value: Tensor

    def __init__(
        self,
        *,
        spec: QuantSpec,
        quantizer: MakeQuantizer,
        share: Rate,
        by: Literal["magnitude", "random"] = "magnitude",
    ) -> None:
        checked_share("Incremental", "share", share)
        if by not in ("magnitude", "random"):
            raise ValueError(f"Incremental: by must be 'magnitude' or 'random', got {by!r}")
        super().__init__(spec=spec, quantizer=quantizer)
        vars(self).update(switchable=False)
        self.inner.requires_grad_(False)
        self.schedule, self.by = share, by
        self.register_buffer("frozen", torch.zeros(spec.shape, dtype=torch.bool))
        # Float32 bit by bit: an average of weights that takes floating buffers too must not mix values with the zeros
        # from before they were frozen.
        self.register_buffer("value", torch.zeros(spec.shape, dtype=torch.int32))
        self._wanted: float | None = None
        self._done: float | None = None
        self._key = 0

    def begin_step_(self, *, progress: float, key: int) -> None:
        self._wanted, self._key = rate_at(self.schedule, progress), key

    @property
    def due(self) -> bool:
        # A resumed run does not know what was done and asks once more; the buffers still have it.
        return self._wanted != self._done

    @torch.no_grad()
    def partition_(self, weight: Tensor) -> Tensor:
        assert self._wanted is not None
        if self.by == "magnitude":
            rank_by = weight.abs()
        else:
            key = torch.tensor(self._key, device=weight.device)
            rank_by = keyed_uniform(key, tuple(weight.shape))
        chosen = largest_first(rank_by, self.frozen, round(self._wanted * weight.numel()))
        new = chosen & ~self.frozen
        self.value.copy_(torch.where(new, self.settled(weight).float().view(torch.int32), self.value))
        self.frozen.copy_(chosen)
        self._done = self._wanted
        return self.restored(weight)

    def settled(self, weight: Tensor) -> Tensor:
        """``Q(weight)`` as it will be deployed."""
        with evaluating(self.inner):
            quantized: Tensor = self.inner(weight)
        return quantized

    def restored(self, weight: Tensor) -> Tensor:
        """``weight`` with its frozen part where it was frozen."""
        return torch.where(self.frozen, self.value.view(torch.float32).to(weight.dtype), weight)

    def project(self, weight: Tensor) -> Tensor:
        return self.restored(project(self.inner, weight))

    def fake_quantize(self, x: Tensor) -> Tensor:
        if not self.training:
            quantized: Tensor = self.inner(x)
            return quantized
        held = x.detach().masked_fill(~self.frozen, 0.0)
        return x.masked_fill(self.frozen, 0.0) + held

    def quantize(self, x: Tensor) -> QTensor:
        return self.inner.quantize(x)

    @torch.no_grad()
    def calibrate_(self, observed: Observed) -> None:
        self.inner.calibrate_(observed)
        assert observed.tensor is not None
        self._require_elementwise(observed.tensor)
        self.frozen.fill_(False)
        self.follow_inner_()

    def _require_elementwise(self, weight: Tensor) -> None:
        """Refuse a ``Q`` whose values in one half of the weight depend on the other half."""
        part = largest_first(weight.abs(), torch.zeros_like(weight, dtype=torch.bool), weight.numel() // 2)
        settled = self.settled(weight)
        for others in (0.0, 100.0):
            again = self.settled(torch.where(part, settled, weight * others))
            if not torch.equal(again[part], settled[part]):
                raise ValueError(
                    f"Incremental: {type(self.inner).__name__} looks at the whole tensor, so that what was frozen "
                    "early would decode differently later; take one whose range is its own: affine, lsq, "
                    "power_of_two, kmeans"
                )

    def stored_state(self) -> Mapping[str, NumberPart]:
        return self.inner.stored_state()
