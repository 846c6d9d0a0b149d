"""The value types that every floor shares: frozen, small, without behavior that needs a model.

Imports nothing of qtrain.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from qtrain.spec.allocation import Allocation, Choice, CostTable, LayerBits, Role, Scores
from qtrain.spec.granularity import Auto, Granularity, PerBlock, PerChannel, PerGroup, PerSample, PerTensor, PerToken
from qtrain.spec.layers import LayerNames

__all__ = [
    "FULL_PRECISION",
    "NO_LABEL",
    "Allocation",
    "Auto",
    "Batch",
    "Choice",
    "CostTable",
    "DataInfo",
    "Granularity",
    "Histogram",
    "LayerBits",
    "LayerNames",
    "Observed",
    "PerBlock",
    "PerChannel",
    "PerGroup",
    "PerSample",
    "PerTensor",
    "PerToken",
    "Position",
    "QuantSpec",
    "Role",
    "Scores",
    "StepOutputs",
]

FULL_PRECISION = 32
"""Bit width that means "leave in floating point"."""

NO_LABEL = -1
"""The class index of an image without a label, which losses on labels leave out."""


class Batch(NamedTuple):
    """What a loader yields.

    ``image`` (N, C, H, W) float, normalized with the data module's mean and std; ``target`` (N,) int64 class
    indices, :data:`NO_LABEL` for an image without a label, or (N, K) float probabilities after mixup or cutmix;
    ``index`` (N,) int64, the samples' numbers in the dataset, which with (seed, epoch) determine every random choice
    that was made for them.
    """

    image: Tensor
    target: Tensor
    index: Tensor  # type: ignore[assignment] # hides tuple.index, which nobody needs of a batch

    @property
    def labeled(self) -> int:
        """How many images have a label, or probabilities; the host waits for it."""
        return len(self.target) if self.target.is_floating_point() else int((self.target != NO_LABEL).sum())


class Position(NamedTuple):
    """How far a run has come: epochs begun, optimizer steps done, bytes of metrics.jsonl written.

    A later stage of the run counts on from there.
    """

    epoch: int = 0
    step: int = 0
    written: int = 0


@dataclass(frozen=True)
class DataInfo:
    """Facts of a dataset that a model and a report need.

    ``mean`` and ``std`` are per channel, in units of pixel value / 255. ``kind`` is ``resident`` or ``streaming``.
    ``classes`` are the names of the classes in order, empty where they have none.

    In evaluation an image of another size is resized by ``interpolation``, so that ``image_size`` is ``crop_pct`` of
    its shorter side, and cut out of the middle.
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
    classes: tuple[str, ...] = ()
    crop_pct: float = 1.0
    interpolation: str = "bicubic"


@dataclass(frozen=True)
class QuantSpec:
    """What a conversion asks of a quantizer: for which tensor, with how many bits.

    ``shape`` is the tensor's shape as far as it is known ahead: a weight's full shape (O, I, ...), ``()`` for
    activations. ``signed=None`` leaves the choice to calibration: unsigned where nothing negative was seen (after a
    ReLU). ``channel_axis`` is the axis that a product sums over: 1 of weights and maps (N, C, H, W), -1 of tokens.
    """

    bits: int
    shape: tuple[int, ...] = ()
    signed: bool | None = None
    channel_axis: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 16:
            raise ValueError(
                f"QuantSpec: bits must be in 1..16, got {self.bits}; "
                f"leave a layer out of the allocation (or give {FULL_PRECISION}) to keep it in floating point"
            )

    @property
    def is_weight(self) -> bool:
        """Whether the tensor is a weight, whose shape and values are known ahead."""
        return bool(self.shape)


class Histogram(NamedTuple):
    """How many values lie in each of B bins: ``counts`` (*state, B) int64, for each group of the granularity.

    Bin i holds the values from ``near[i]`` to ``far[i]``, (B,) float32; ``near`` is the edge nearer to zero. The bins
    of values that are not negative come first, in rising magnitude; then, if the observer tells the signs apart, as
    many of negative values, with the same magnitudes. Zero is in the first bin of its half.
    """

    counts: Tensor
    near: Tensor
    far: Tensor


class Observed(NamedTuple):
    """What an observer has seen of a tensor; every metric has the quantizer's state shape, float32.

    ``low`` and ``high`` bound the range to represent (the observer may have clipped outliers away);
    ``mean_abs`` is the mean magnitude. ``tensor`` is the tensor itself where it is at hand, which is so for weights.
    ``histogram`` is that of all values, where the observer keeps one.
    """

    low: Tensor
    high: Tensor
    mean_abs: Tensor
    tensor: Tensor | None = None
    histogram: Histogram | None = None


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
