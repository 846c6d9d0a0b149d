"""The value types that every floor shares: frozen, small, without behaviour that needs a model.

Floor 0: imports nothing of qtrain.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

FULL_PRECISION = 32
"""Bit width that means "leave in floating point"."""


class Batch(NamedTuple):
    """What a loader yields.

    ``image`` (N, C, H, W) float, normalised with the data module's mean and std; ``target`` (N,) int64 class
    indices, or (N, K) float probabilities after mixup or cutmix; ``index`` (N,) int64, the samples' numbers in
    the dataset, which with (seed, epoch) determine every random choice that was made for them.
    """

    image: Tensor
    target: Tensor
    index: Tensor  # type: ignore[assignment] # hides tuple.index, which nobody needs of a batch


@dataclass(frozen=True)
class DataInfo:
    """Facts of a dataset that a model and a report need.

    ``mean`` and ``std`` are per channel, in units of pixel value / 255. ``kind`` is ``resident`` or ``streaming``.
    """

    name: str
    num_classes: int
    in_channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train_size: int
    val_size: int
    test_size: int
    kind: str


@dataclass(frozen=True)
class Granularity(ABC):
    """Which elements of a tensor share one scale.

    A state tensor of a quantizer has the broadcastable ``state_shape`` of the tensor that it serves, so that
    ``x / scale`` needs no reshape.
    """

    @abstractmethod
    def state_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of scale and zero point for a tensor of ``shape``."""

    @abstractmethod
    def flatten(self, x: Tensor) -> Tensor:
        """View or copy of ``x`` as (groups, elements of a group), one row for each scale."""


@dataclass(frozen=True)
class PerTensor(Granularity):
    """One scale for all: state shape ``()``, whatever the tensor's shape."""

    def state_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return ()

    def flatten(self, x: Tensor) -> Tensor:
        return x.reshape(1, -1)


@dataclass(frozen=True)
class PerChannel(Granularity):
    """One scale for each index of ``axis``: a weight (O, I, kh, kw) with axis 0 has states (O, 1, 1, 1)."""

    axis: int = 0

    def state_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if not -len(shape) <= self.axis < len(shape):
            raise ValueError(
                f"PerChannel: axis {self.axis} is outside a tensor of shape {tuple(shape)}; "
                "use PerTensor() for tensors of unknown rank"
            )
        axis = self.axis % len(shape)
        return tuple(n if i == axis else 1 for i, n in enumerate(shape))

    def flatten(self, x: Tensor) -> Tensor:
        return x.movedim(self.axis, 0).reshape(x.shape[self.axis], -1)


@dataclass(frozen=True)
class QuantSpec:
    """What a conversion asks of a quantizer: for which tensor, with how many bits.

    ``shape`` is the tensor's shape as far as it is known ahead: a weight's full shape, ``()`` for activations.
    ``signed=None`` leaves the choice to calibration: unsigned where nothing negative was seen (after a ReLU).
    """

    bits: int
    shape: tuple[int, ...] = ()
    signed: bool | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 16:
            raise ValueError(
                f"QuantSpec: bits must be in 1..16, got {self.bits}; "
                f"leave a layer out of the allocation (or give {FULL_PRECISION}) to keep it in floating point"
            )


class Observed(NamedTuple):
    """What an observer has seen of a tensor; every field has the quantizer's state shape, float32.

    ``low`` and ``high`` bound the range to represent (the observer may have clipped outliers away);
    ``mean_abs`` is the mean magnitude.
    """

    low: Tensor
    high: Tensor
    mean_abs: Tensor


@dataclass(frozen=True)
class QTensor:
    """A quantised tensor as it would be stored: integer codes and what decodes them.

    ``value = (codes - zero_point) * scale``, computed in float32 and cast to ``dtype``. ``codes`` has the shape
    of the original tensor; ``scale`` and ``zero_point`` broadcast against it. ``low <= codes <= high``.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int
    low: int
    high: int
    dtype: torch.dtype = torch.float32
    scale_bits: int = 32

    def dequantize(self) -> Tensor:
        """The values that the codes stand for, in ``dtype``."""
        shifted = self.codes if self.zero_point is None else self.codes - self.zero_point
        return (shifted.to(torch.float32) * self.scale).to(self.dtype)

    @property
    def nbits(self) -> int:
        """Exact storage in bits: codes, scales, and zero points (one code width each) where there are any."""
        zero_points = 0 if self.zero_point is None else self.zero_point.numel()
        return self.codes.numel() * self.bits + self.scale.numel() * self.scale_bits + zero_points * self.bits


class LayerBits(NamedTuple):
    """Bit widths of one layer; ``FULL_PRECISION`` leaves the weight or the input in floating point."""

    weight: int
    input: int


Allocation = Mapping[str, LayerBits]
"""Bits of a model: qualified layer name -> LayerBits. What a manual config, a search and a trial all produce."""


@dataclass(frozen=True)
class StepOutputs:
    """What one training step computed, and all that a term of the objective may look at.

    Logits are (N, K). Features map a layer's qualified name to its output, (N, C, H, W) or (N, L, C).
    """

    logits: Tensor
    target: Tensor
    features: Mapping[str, Tensor] = field(default_factory=dict)
    teacher_logits: Tensor | None = None
    teacher_features: Mapping[str, Tensor] = field(default_factory=dict)
