"""Which elements of a tensor share one scale: frozen values, and the three questions that a quantizer asks them.

A weight is always laid out (O, I, ...): output channels first, then the inputs that a product sums over. The shape of
an activation is unknown ahead, so what depends on it (sample, token) serves quantizers that take their scale from the
batch at hand.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

from torch import Tensor


@dataclass(frozen=True)
class Granularity(ABC):
    """Which elements of a tensor share one scale.

    >>> PerChannel(axis=0).state_shape((8, 4, 3, 3)), PerGroup(size=2).state_shape((8, 4, 3, 3))
    ((8, 1, 1, 1), (4, 1, 1, 1))
    """

    @abstractmethod
    def state_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of scale and zero point for a tensor of ``shape``; raises ``ValueError`` where it does not fit."""

    @abstractmethod
    def flatten(self, x: Tensor) -> Tensor:
        """View or copy of ``x`` as (groups, elements of a group), one row for each scale, in the state's order."""

    @abstractmethod
    def expand(self, state: Tensor, shape: tuple[int, ...]) -> Tensor:
        """``state`` as it broadcasts against a tensor of ``shape``."""


@final
@dataclass(frozen=True)
class PerTensor(Granularity):
    """One scale for all: state shape ``()``, whatever the tensor's shape."""

    def state_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return ()

    def flatten(self, x: Tensor) -> Tensor:
        return x.reshape(1, -1)

    def expand(self, state: Tensor, shape: tuple[int, ...]) -> Tensor:
        return state


@final
@dataclass(frozen=True)
class PerChannel(Granularity):
    """One scale for each index of ``axis``: a weight (O, I, kh, kw) with axis 0 has states (O, 1, 1, 1)."""

    axis: int = 0

    def state_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        axis = _checked_axis(self, shape)
        return tuple(n if i == axis else 1 for i, n in enumerate(shape))

    def flatten(self, x: Tensor) -> Tensor:
        return _rows(x.movedim(self.axis, 0), x.shape[self.axis])

    def expand(self, state: Tensor, shape: tuple[int, ...]) -> Tensor:
        return state


@final
@dataclass(frozen=True)
class PerGroup(Granularity):
    """One scale for ``size`` neighboring output channels: a weight (O, I, kh, kw) has states (O / size, 1, 1, 1)."""

    size: int

    def __post_init__(self) -> None:
        _check_size(self, self.size)

    def state_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        _checked_axis(self, shape, 0)
        return (_groups(self, shape[0], self.size, "output channels"), *(1 for _ in shape[1:]))

    def flatten(self, x: Tensor) -> Tensor:
        return _rows(x, x.shape[0] // self.size)

    def expand(self, state: Tensor, shape: tuple[int, ...]) -> Tensor:
        return state.repeat_interleave(min(self.size, shape[0]), dim=0)


@final
@dataclass(frozen=True)
class PerBlock(Granularity):
    """One scale for ``size`` neighboring input channels of each output channel.

    A weight (O, I, kh, kw) has states (O, I / size, 1, 1). Blocks lie along the axis that a product sums over, so that
    an accumulator meets a new scale only every ``size`` channels.
    """

    size: int

    def __post_init__(self) -> None:
        _check_size(self, self.size)

    def state_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        _checked_axis(self, shape, 1)
        return (shape[0], _groups(self, shape[1], self.size, "input channels"), *(1 for _ in shape[2:]))

    def flatten(self, x: Tensor) -> Tensor:
        return _rows(x, x.shape[0] * (x.shape[1] // self.size))

    def expand(self, state: Tensor, shape: tuple[int, ...]) -> Tensor:
        return state.repeat_interleave(min(self.size, shape[1]), dim=1)


@final
@dataclass(frozen=True)
class PerSample(Granularity):
    """One scale for each sample of a batch: an activation (N, C, H, W) has states (N, 1, 1, 1). Dynamic only."""

    def state_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return PerChannel(_checked_axis(self, shape, 0)).state_shape(shape)

    def flatten(self, x: Tensor) -> Tensor:
        return PerChannel(0).flatten(x)

    def expand(self, state: Tensor, shape: tuple[int, ...]) -> Tensor:
        return state


@final
@dataclass(frozen=True)
class PerToken(Granularity):
    """One scale for each vector over the channels, which lie on ``axis``. Dynamic only.

    Tokens (N, L, C) with axis -1 have states (N, L, 1); positions of a map (N, C, H, W) with axis 1 (N, 1, H, W).
    """

    axis: int = -1

    def state_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        axis = _checked_axis(self, shape)
        return tuple(1 if i == axis else n for i, n in enumerate(shape))

    def flatten(self, x: Tensor) -> Tensor:
        moved = x.movedim(self.axis, -1)
        return _rows(moved, moved.shape[:-1].numel())

    def expand(self, state: Tensor, shape: tuple[int, ...]) -> Tensor:
        return state


@final
@dataclass(frozen=True)
class Auto(Granularity):
    """One scale for each output channel of a weight, one for a whole input: what configs take where nothing is said.

    It stands for one of the two. A quantizer, which knows what its tensor is, asks :meth:`of` and uses the answer.

    >>> Auto().of((8, 4, 3, 3)), Auto().of(())
    (PerChannel(axis=0), PerTensor())
    """

    def of(self, shape: tuple[int, ...]) -> Granularity:
        """The granularity for a tensor whose shape is known ahead to be ``shape``: ``()`` of inputs."""
        return PerChannel(0) if shape else PerTensor()

    def state_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return self.of(shape).state_shape(shape)

    def flatten(self, x: Tensor) -> Tensor:
        raise TypeError("Auto: does not know a weight from an input; call of() with the shape that is known ahead")

    def expand(self, state: Tensor, shape: tuple[int, ...]) -> Tensor:
        raise TypeError("Auto: does not know a weight from an input; call of() with the shape that is known ahead")


def _rows(x: Tensor, rows: int) -> Tensor:
    # Not -1, because torch cannot infer it for an empty tensor.
    return x.reshape(rows, x.numel() // rows if rows else 0)


def _check_size(granularity: Granularity, size: int) -> None:
    if size < 1:
        raise ValueError(f"{type(granularity).__name__}: size must be at least 1, got {size}")


def _checked_axis(granularity: Granularity, shape: tuple[int, ...], axis: int | None = None) -> int:
    axis = getattr(granularity, "axis", 0) if axis is None else axis
    if not -len(shape) <= axis < len(shape):
        raise ValueError(
            f"{type(granularity).__name__}: axis {axis} is outside a tensor of shape {tuple(shape)}; "
            "use PerTensor() for tensors of unknown rank, or quantizer=dynamic for scales of each batch"
        )
    return axis % len(shape)


def _groups(granularity: Granularity, channels: int, size: int, what: str) -> int:
    if channels % size:
        divisors = [n for n in range(1, channels + 1) if channels % n == 0]
        raise ValueError(
            f"{type(granularity).__name__}: size {size} does not divide {channels} {what}; use one of {divisors}, or "
            "give this layer a policy of its own"
        )
    return channels // size
