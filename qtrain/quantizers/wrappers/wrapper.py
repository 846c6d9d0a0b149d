"""What quantizers around another quantizer share: QuantNoise, blending, ProxQuant, the split of outliers."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from qtrain.quantizers.base import MakeQuantizer, Quantizer
from qtrain.quantizers.hooks import ScalesOutput
from qtrain.spec import Observed, QuantSpec
from qtrain.storage.base import NumberPart, QTensor


class Wrapper(Quantizer, ABC):
    """Base of quantizers that hold another, ``inner``, for the same tensor.

    Bit widths, code range, granularity, and what else a quantizer says of itself are those of ``inner``. The wrapper
    serves only what ``inner`` serves too. :func:`begin_step_` finds a step-aware ``inner`` by itself. A projection of
    the weight must be handed on by the subclass, with ``project(self.inner, weight)`` of the hooks.
    """

    def __init__(self, *, spec: QuantSpec, quantizer: MakeQuantizer) -> None:
        inner = quantizer(spec=spec)
        name = type(self).__name__
        if isinstance(inner, ScalesOutput):
            raise ValueError(
                f"{name}: {type(inner).__name__} needs a factor on the layer's output, which no wrapper hands on; "
                "take bnn for a sign without factor"
            )
        # Set on the instance, where they hide the class's own, because they depend on the inner quantizer.
        vars(self).update(
            widths=inner.widths,
            serves=self.serves & inner.serves,
            keeps_zero=inner.keeps_zero,
            shifts_codes=inner.shifts_codes,
            moves_weight=inner.moves_weight or isinstance(self, TrainingWrapper),
            switchable=inner.switchable,
        )
        super().__init__(spec=spec, granularity=inner.granularity, codes=inner._codes)
        self.inner = inner
        self.follow_inner_()

    @final
    def follow_inner_(self) -> None:
        """Take over the sign, and whether it is calibrated, from ``inner``; for the end of a calibration."""
        self.set_range_(bits=int(self.bits), signed=bool(self.inner.signed))
        self.initialized.copy_(self.inner.initialized)


def innermost(quantizer: Quantizer) -> Quantizer:
    """The quantizer inside all wrappers of ``quantizer``; ``quantizer`` itself if it is not a wrapper."""
    while isinstance(quantizer, Wrapper):
        quantizer = quantizer.inner
    return quantizer


class TrainingWrapper(Wrapper, ABC):
    """A wrapper that changes only the forward in training: in eval mode and in storage it is ``inner``."""

    @final
    def fake_quantize(self, x: Tensor) -> Tensor:
        return self.train_forward(x) if self.training else self.inner(x)

    @abstractmethod
    def train_forward(self, x: Tensor) -> Tensor:
        """The forward of an enabled quantizer in training: ``x`` and ``self.inner(x)`` made into one."""

    @final
    def quantize(self, x: Tensor) -> QTensor:
        return self.inner.quantize(x)

    @final
    @torch.no_grad()
    def calibrate_(self, observed: Observed) -> None:
        self.inner.calibrate_(observed)
        self.follow_inner_()

    @final
    def stored_state(self) -> Mapping[str, NumberPart]:
        return self.inner.stored_state()
