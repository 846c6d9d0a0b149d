"""Hashes of a model's weights and structure, which are equal for models that compute the same."""

import hashlib
from collections.abc import Iterator, Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qtrain.utils.spelling import code_digest, is_users, spelled, spelled_plain

OF_TORCH = frozenset(vars(nn.Module()))
"""Attributes that every module has: its parameters, buffers, children and hooks among them."""

NOTES = ("pretrained_cfg", "default_cfg", "feature_info", "_model_args", "_traits")
"""What timm notes of how a network was made and where its weights come from; no network computes with it."""


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of all parameters, buffers and further tensors of ``model`` with their names, types and shapes."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    registered = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    for name, module in model.named_modules():
        for key, value in _further(module):
            further = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and id(leaf) not in registered]
            tensors |= {f"{name}.{key}.{number}": tensor for number, tensor in enumerate(further)}
    weights = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        weights.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return weights.hexdigest()


def structure_digest(model: nn.Module) -> str:
    """SHA-256 of the modules of ``model``: their classes, their options, and the code of classes of the user's own.

    Options are all attributes that are no parameters, buffers, modules or hooks: values, mappings, dataclasses,
    functions and objects of the user's classes, with what they hold. Objects of other classes count by their class.
    """
    return hashlib.sha256("\n".join(_structure(model)).encode()).hexdigest()


def architecture_digest(model: nn.Module) -> str:
    """SHA-256 of the structure of ``model`` and the names and shapes of its tensors, whatever their values."""
    shapes = sorted(f"{name} {tuple(tensor.shape)}" for name, tensor in model.state_dict().items())
    return hashlib.sha256("\n".join([structure_digest(model), *shapes]).encode()).hexdigest()


def _structure(model: nn.Module) -> Iterator[str]:
    """Lines for each module: its name, its class and plain options; then what else there is to say of it, if anything.

    A network with plain options and no code of the user's own thus keeps the digest that it had in earlier versions.
    """
    for name, module in model.named_modules():
        kind, options = type(module), {key: spelled_plain(value) for key, value in vars(module).items()}
        plain = sorted((key, text) for key, text in options.items() if text is not None)
        yield f"{name} {kind.__module__}.{kind.__qualname__} {plain}"
        yield from (f"{name}.{key} {spelled(value)}" for key, value in _further(module))
        if (code := code_digest(kind)) is not None:
            yield f"{name} {code}"


def _further(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The options of ``module`` that its plain ones leave out; an empty mapping or set says nothing."""
    for key, value in sorted(vars(module).items()):
        empty = isinstance(value, Mapping | Set) and not value
        if key not in OF_TORCH and key not in NOTES and not _is_plain(value) and not empty:
            yield key, value


def _is_plain(value: Any) -> bool:
    """Whether the plain text of ``value`` says all; of a user's function it is the name alone."""
    return spelled_plain(value) is not None and not (callable(value) and is_users(value))
