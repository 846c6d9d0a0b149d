"""A teacher that answers and never learns.

It is not an ``nn.Module``, so that an owner that holds it as an attribute does not register, save, move, train or
optimize it: the teacher is absent from the checkpoint and the optimizer by construction, not by a filter.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from qtrain.functional.ranks import world_size
from qtrain.models.identity import structure_digest, weights_digest
from qtrain.models.sharding import shard_
from qtrain.models.taps import FeatureTaps
from qtrain.spec import Batch


class Teacher(ABC):
    """Gives the outputs that a student should have for a batch; never an ``nn.Module``, for the reason above."""

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The layers whose outputs come with the logits."""

    @abstractmethod
    def answer(self, batch: Batch, epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (N, K) float32 and the tapped features by name, for a training batch of ``epoch``."""

    @abstractmethod
    def to(self, device: torch.device | str, memory_format: torch.memory_format = torch.preserve_format) -> Self:
        """Move the models to ``device``, in the memory format ``torch.channels_last`` if the images have it."""


class FrozenTeacher(Teacher):
    """``teacher(image) -> (logits, features)``: eval mode, no gradient, the teacher's own input normalization.

    ``image`` (N, C, H, W) comes normalized with the data's ``data_mean`` and ``data_std``; where the teacher was
    trained with others (``mean``, ``std``) it is converted, x * (data_std / std) + (data_mean - mean) / std, and
    left as it is where they agree. ``bf16`` runs the forward under autocast; logits come back in float32,
    features as they are computed. ``names`` are the layers to tap. ``shard`` spreads the parameters of a copy over the
    ranks, where there are several, for a teacher that one device cannot hold.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        names: Sequence[str] = (),
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        data_mean: Sequence[float] | None = None,
        data_std: Sequence[float] | None = None,
        bf16: bool = False,
        compile: bool = False,
        shard: bool = False,
    ) -> None:
        if compile and shard:
            raise ValueError("FrozenTeacher: a sharded teacher gathers its blocks by hooks and is not compiled")
        self._model = model.eval().requires_grad_(False)
        self._taps = FeatureTaps(model, names)
        self._bf16 = bf16
        self._device = next(model.parameters()).device
        self._renormalize = _renormalization(mean, std, data_mean, data_std, self._device)
        self._forward: Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]] = self._taps.forward_with_features
        if compile:
            self._forward = torch.compile(self._forward, fullgraph=True)
        self._shard = shard
        self._whole: dict[str, str] | None = None  # its identity before it was sharded

    @torch.no_grad()
    def __call__(self, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (N, K) float32 and the tapped features by name."""
        image = image.float()  # the images of a student that trains in 64 or 16 bits
        if self._renormalize is not None:
            factor, offset = self._renormalize
            image = torch.addcmul(offset, image, factor)
        # The caller may be under autocast; the teacher's precision does not depend on it.
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._bf16):
            logits, features = self._forward(image)
        return logits.float(), features

    def answer(self, batch: Batch, epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self(batch.image)

    @property
    def names(self) -> tuple[str, ...]:
        return self._taps.names

    @property
    def model(self) -> nn.Module:
        """The network itself, for looking at: its head, its layers, its weights."""
        return self._model

    def identity(self) -> dict[str, Any]:
        """What an answer depends on besides the image, as plain values, except for how numbers are rounded."""
        return {
            **(self._whole or _digests(self._model)),
            "renormalize": None if self._renormalize is None else [v.flatten().tolist() for v in self._renormalize],
            "bf16": self._bf16,
            "device": self._device.type,
        }

    def train(self, mode: bool = True) -> "FrozenTeacher":
        """Do nothing: a frozen teacher has one mode. Code that switches modes thus needs no special case."""
        return self

    def to(self, device: torch.device | str, memory_format: torch.memory_format = torch.preserve_format) -> Self:
        if not self._shard or world_size() == 1:
            self._model.to(device).to(memory_format=memory_format)
        elif self._whole is None:
            self._shard_(device)
        self._device = torch.device(device)
        if self._renormalize is not None:
            factor, offset = self._renormalize
            self._renormalize = (factor.to(device), offset.to(device))
        return self

    def _shard_(self, device: torch.device | str) -> None:
        """Replace the model by a sharded copy; other owners of the model keep it whole."""
        self._whole = _digests(self._model)
        names = self._taps.names
        self._taps.close()
        self._model = copy.deepcopy(self._model).to(memory_format=torch.contiguous_format)  # as FSDP2 wants it
        self._taps = FeatureTaps(self._model, names)
        self._forward = self._taps.forward_with_features
        shard_(self._model, device)


def _digests(model: nn.Module) -> dict[str, str]:
    return {"weights": weights_digest(model), "structure": structure_digest(model)}


def _renormalization(
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    data_mean: Sequence[float] | None,
    data_std: Sequence[float] | None,
    device: torch.device,
) -> tuple[Tensor, Tensor] | None:
    """(factor, offset), each (1, C, 1, 1), with teacher image = factor * data image + offset; None for the identity."""
    given = [value is not None for value in (mean, std, data_mean, data_std)]
    if not any(given[:2]):
        return None
    if mean is None or std is None or data_mean is None or data_std is None:
        raise ValueError("FrozenTeacher: mean and std need each other and data_mean, data_std; give all four or none")
    lengths = {len(value) for value in (mean, std, data_mean, data_std)}
    if len(lengths) != 1:
        raise ValueError(f"FrozenTeacher: mean, std, data_mean and data_std must be of one length, got {lengths}")
    if min(*std, *data_std) <= 0:
        raise ValueError(f"FrozenTeacher: std must be positive, got {tuple(std)} and {tuple(data_std)}")
    if tuple(mean) == tuple(data_mean) and tuple(std) == tuple(data_std):
        return None
    own_mean, own_std, their_mean, their_std = (
        torch.tensor(list(value), dtype=torch.float64) for value in (mean, std, data_mean, data_std)
    )
    factor, offset = their_std / own_std, (their_mean - own_mean) / own_std
    return tuple(value.float().view(1, -1, 1, 1).to(device) for value in (factor, offset))  # type: ignore[return-value]
