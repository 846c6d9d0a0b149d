"""Hashes of a model's weights and structure, which are equal for models that compute the same."""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of all parameters and buffers of ``model`` with their names, types and shapes."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    weights = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        weights.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return weights.hexdigest()


def structure_digest(model: nn.Module) -> str:
    """SHA-256 of the modules of ``model``, their classes, and those of their options that are plain values."""
    return hashlib.sha256("\n".join(_structure(model)).encode()).hexdigest()


def architecture_digest(model: nn.Module) -> str:
    """SHA-256 of the structure of ``model`` and the names and shapes of its tensors, whatever their values."""
    shapes = sorted(f"{name} {tuple(tensor.shape)}" for name, tensor in model.state_dict().items())
    return hashlib.sha256("\n".join([structure_digest(model), *shapes]).encode()).hexdigest()


def _structure(model: nn.Module) -> Iterator[str]:
    """A line for each module: its name, its class, and those of its options that are plain values or functions."""
    for name, module in model.named_modules():
        options = {key: spelled for key, value in vars(module).items() if (spelled := _spell(value)) is not None}
        yield f"{name} {type(module).__module__}.{type(module).__qualname__} {sorted(options.items())}"


def _spell(value: Any) -> str | None:
    """``value`` as text that another process would spell alike; ``None`` where there is no such text."""
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    if isinstance(value, list | tuple):
        parts = [_spell(part) for part in value]
        return None if None in parts else repr(parts)
    return getattr(value, "__qualname__", None)
