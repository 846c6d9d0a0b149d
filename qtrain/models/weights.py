"""Weights from a file into a model, without running anything that the file contains.

One function for the formats people have: ``.th``, ``.pth``, ``.pt`` (zip and the older pickle), ``.safetensors``
and Lightning's ``.ckpt``. The model is changed only if everything fits.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

log = logging.getLogger(__name__)

TORCH_SUFFIXES = (".th", ".pth", ".pt", ".ckpt", ".bin")
CONTAINERS = ("state_dict", "model", "model_state_dict")
PREFIXES = ("student.", "module.", "model.", "_orig_mod.")
KEYS_SHOWN = 8


def load_weights(model: nn.Module, path: str | Path, *, reset_head: bool = False) -> None:
    """Fill ``model`` with the weights in ``path``; its keys must be exactly those of the model, each of the right
    shape.

    Dictionaries around the weights (``state_dict``, ``model``) are opened, and the prefixes of DDP, Lightning and
    torch.compile (``module.``, ``student.``, ``model.``, ``_orig_mod.``) taken off. With ``reset_head`` a
    classifier for another number of classes is not an error: the head starts afresh, and the log says so.

    Raises FileNotFoundError, or ValueError for a file that is damaged, holds code, or does not fit.
    """
    path = Path(path)
    state = strip_prefixes(read_weights(path), own=set(model.state_dict()))
    own = model.state_dict()
    if reset_head:
        state = _without_other_head(model, state, path)
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    reshaped = [
        f"{key} (file {tuple(state[key].shape)}, model {tuple(own[key].shape)})"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    wrong = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    if any(wrong.values()):
        parts = "; ".join(f"{len(keys)} {what}: {_some(keys)}" for what, keys in wrong.items() if keys)
        other_head = all(key.startswith(head_names(model)) for key in (*missing, *unexpected, *reshaped))
        remedy = "set reset_head=true to take all but the head" if other_head else "check the model's name and options"
        raise ValueError(f"load_weights: {path} does not fit {type(model).__name__}: {parts}; {remedy}")
    model.load_state_dict(state)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a weights file by name, on the CPU, prefixes and all."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"load_weights: there is no file {path}; check the path of `weights`")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(
                f"load_weights: {path} is damaged or no safetensors file ({error}); copy it anew"
            ) from error
    if path.suffix not in TORCH_SUFFIXES:
        known = ", ".join((*TORCH_SUFFIXES, ".safetensors"))
        raise ValueError(f"load_weights: the suffix must be one of {known}, got {path.name!r}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"load_weights: {path} holds Python objects besides tensors, or is no PyTorch file, and is not opened; "
            "save model.state_dict() alone"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, UnicodeDecodeError) as error:
        raise ValueError(
            f"load_weights: {path} is truncated or no PyTorch file ({_line(error)}); copy it anew"
        ) from error
    return _tensors(content, path)


def strip_prefixes(state: Mapping[str, Tensor], *, own: set[str]) -> dict[str, Tensor]:
    """``state`` with the prefixes of wrappers taken off its keys, as long as the model's own keys lack them.

    A prefix that only some keys have marks the model inside something larger (a LightningModule with its
    objective, an average with its counter): the others are left behind and the log counts them.
    """
    state = dict(state)
    while True:
        prefix = next((p for p in PREFIXES if _has(state, p) and not _has(own, p)), None)
        if prefix is None:
            return state
        inside = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        if len(inside) < len(state):
            log.info(
                "weights: taking the %d tensors under %r, leaving %d", len(inside), prefix, len(state) - len(inside)
            )
        state = inside


def head_names(model: nn.Module) -> tuple[str, ...]:
    """Qualified names of a timm model's classifier (more than one where it was trained with distillation)."""
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _without_other_head(model: nn.Module, state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """``state`` with the model's own, fresh classifier where the file has one for another number of classes."""
    own = model.state_dict()
    for name in head_names(model):
        keys = [key for key in own if key.startswith(f"{name}.")]
        if all(key in state and state[key].shape == own[key].shape for key in keys):
            continue
        for module in model.get_submodule(name).modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.reset_parameters()
        log.info("weights: %s has another head than %s; %r starts afresh", path, type(model).__name__, name)
        fresh = {key: value for key, value in model.state_dict().items() if key in keys}
        state = {key: value for key, value in state.items() if not key.startswith(f"{name}.")} | fresh
    return state


def _tensors(content: Any, path: Path) -> dict[str, Tensor]:
    """The mapping name -> tensor inside whatever was saved around it."""
    while isinstance(content, Mapping):
        inner = next((content[key] for key in CONTAINERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    found = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not found:
        raise ValueError(f"load_weights: {path} holds no named tensors; save model.state_dict()")
    return found


def _has(keys: Any, prefix: str) -> bool:
    return any(key.startswith(prefix) for key in keys)


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:KEYS_SHOWN]) + (", ..." if len(keys) > KEYS_SHOWN else "")


def _line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:120]
