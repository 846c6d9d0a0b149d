"""What a file of weights holds, read without running anything that is in it.

The formats are those that people have: ``.th``, ``.pth``, ``.pt``, ``.bin`` and ``.pth.tar`` (zip and the older
pickle), ``.safetensors`` and Lightning's ``.ckpt``. Training programs save more than the weights: an average of them,
the optimizer, their own options. The weights are found among it, and the log says what else there was to choose from.
"""

import argparse
import json
import logging
import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from qtrain.models.normalization import Normalization, normalization
from qtrain.utils.errors import first_line
from qtrain.utils.suggestions import did_you_mean

log = logging.getLogger(__name__)

TORCH_SUFFIXES = (".th", ".pth", ".pt", ".ckpt", ".bin", ".tar")
INERT = (argparse.Namespace,)
"""Classes besides torch's own that a file may hold. A ``Namespace`` takes attributes and has no code of its own; what
programs keep in ``args`` is read as such, and each value in it must be admitted too."""

PLAIN = ("state_dict", "model_state_dict", "model", "net", "network", "module", "weights", "params")
"""Names of the weights that were trained, the likeliest first."""
AVERAGES = {"ema", "swa", "avg", "average", "averaged"}
"""Words in the name of averaged weights."""
NOT_WEIGHTS = re.compile("(optim(i[sz]er)?|scaler|amp|callback|loop|hyper_parameter|arg|config|cfg)s?(?![a-z])|.*sched")
"""How keys begin that hold anything but a model: with one of these words, not with a longer one as ``optimal``."""

MEAN, STD = "mean", "std"
STUDENT = "qtrain_student"
"""Metadata of a student's file, see :mod:`qtrain.packed.header`."""

LINE = 120
"""Characters of an error of torch that a message repeats."""


@final
@dataclass(frozen=True)
class WeightFile:
    """The tensors of a file by name, prefixes and all, on the CPU.

    ``normalization`` is that of the images that they were trained on, where the file says it. ``others`` are the places
    of further weights in the file.
    """

    tensors: dict[str, Tensor]
    normalization: Normalization | None = None
    others: tuple[str, ...] = ()


def read_weight_file(path: str | Path, *, state: str | None = None) -> WeightFile:
    """The weights in ``path``.

    Where it holds several, ``state`` says which: their place (``state_dict_ema``, ``ema.module``), its beginning, or a
    word of it (``ema``). ``None`` takes those that are no average; the log names the others. mean and std are read from
    the file's ``args``, from the keys of these names beside the weights, or from the metadata of safetensors.

    Raises FileNotFoundError, or ValueError for a file that is damaged, holds code, or does not have the state.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"load_weights: there is no file {path}; check the path of `weights`")
    if path.suffix == ".safetensors":
        content, stated = _read_safetensors(path)
    elif path.suffix in TORCH_SUFFIXES:
        content, stated = _read_pickle(path), None
    else:
        known = ", ".join((*TORCH_SUFFIXES, ".safetensors"))
        raise ValueError(f"load_weights: the suffix must be one of {known}, got {path.name!r}")
    states = _states(content)
    chosen = _plain(content, states, path) if state is None else _selected(content, states, state, path)
    tensors = {name: value for name, value in chosen.items() if isinstance(value, Tensor)}
    others = tuple(place for place, own in states.items() if own is not chosen)
    return WeightFile(tensors, stated or _stated_by(content), others)


def metadata_of(stated: Normalization) -> dict[str, str]:
    """Metadata for safetensors that say ``stated``."""
    return {MEAN: json.dumps(stated.mean), STD: json.dumps(stated.std)}


def _read_safetensors(path: Path) -> tuple[Mapping[str, Any], Normalization | None]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"load_weights: {path} is damaged or no safetensors file ({error}); copy it anew") from error
    student = _student(metadata[STUDENT], path) if STUDENT in metadata else None
    if student is not None and student.get("weights"):
        raise ValueError(
            f"load_weights: {path} is a quantized student, whose weights are rounded; measure it by task=evaluate "
            "checkpoint=FILE, load it by qtrain.load, and train from the weights that it was made of"
        )
    try:
        means = metadata if student is None else {key: json.dumps(student["images"][key]) for key in (MEAN, STD)}
        return tensors, normalization(json.loads(means[MEAN]), json.loads(means[STD]))
    except (KeyError, TypeError, ValueError):
        return tensors, None


def _student(text: str, path: Path) -> Mapping[str, Any]:
    """What the metadata ``text`` of a student's file says of it. Raises ``ValueError`` where it says nothing."""
    try:
        student = json.loads(text)["student"]
    except (KeyError, TypeError, ValueError):
        student = None
    if not isinstance(student, Mapping):
        raise ValueError(
            f"load_weights: {path} is damaged: its metadata {STUDENT!r} does not describe a student; copy it anew"
        )
    return student


def _read_pickle(path: Path) -> Mapping[str, Any]:
    try:
        with torch.serialization.safe_globals([*INERT]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(
            f"load_weights: {path} holds Python objects besides tensors{f' ({found[1]})' if found else ''}, or is no "
            "PyTorch file, and is not opened; save model.state_dict() alone"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, UnicodeDecodeError) as error:
        raise ValueError(
            f"load_weights: {path} is truncated or no PyTorch file ({first_line(error)[:LINE]}); copy it anew"
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(
            f"load_weights: {path} holds a {type(content).__name__} and no named tensors; save model.state_dict()"
        )
    return content


def _plain(content: Mapping[str, Any], states: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """The weights to take where nobody says which; the log names the others."""
    place = _plain_place(content, states, path)
    others = [other for other in states if other != place]
    if others:
        log.info(
            "weights: taking %s of %s, which also holds %s; model.state=%s takes these",
            place or "the tensors at the top", path.name, ", ".join(others), others[0],
        )  # fmt: skip
    return states[place] if place else content


def _plain_place(content: Mapping[str, Any], states: Mapping[str, Any], path: Path) -> str:
    """The place of the weights to take where nobody says which; empty for ``content`` itself."""
    plain = [place for place in states if not AVERAGES & _words(place)]
    known = [place for place in plain if place.split(".")[0] in PLAIN]
    if known:
        return min(known, key=lambda place: PLAIN.index(place.split(".")[0]))
    if _has_named_tensors(content):
        return ""
    left = plain or list(states)
    if len(left) == 1:
        return left[0]
    if left:
        raise ValueError(f"load_weights: {path} holds several weights: {', '.join(left)}; choose by state={left[0]}")
    keys = ", ".join(map(str, content)) or "none"
    raise ValueError(
        f"load_weights: {path} holds no named tensors (keys at the top: {keys}); save model.state_dict(), or name the "
        "key of the weights by state=KEY"
    )


def _selected(content: Mapping[str, Any], states: Mapping[str, Any], wanted: str, path: Path) -> Mapping[str, Any]:
    """The weights whose place is ``wanted``, begins with it or has it as a word; or the tensors below that prefix."""
    if wanted in states:
        return states[wanted]  # type: ignore[no-any-return]
    below = [place for place in states if place.startswith(f"{wanted}.")]
    fitting = below or [place for place in states if wanted in _words(place)]
    if len(fitting) == 1:
        return states[fitting[0]]  # type: ignore[no-any-return]
    if fitting:
        raise ValueError(f"load_weights: state={wanted} fits several in {path}: {', '.join(fitting)}; give one of them")
    for tensors in (content, *states.values()):
        inside = {key.removeprefix(f"{wanted}."): tensors[key] for key in _below(tensors, wanted)}
        if inside:
            return inside
    there = ", ".join(states) or "one set of weights alone; leave state null"
    raise ValueError(f"load_weights: {path} has no state {wanted!r}{did_you_mean(wanted, states)} (it has {there})")


def _states(content: Mapping[Any, Any], place: str = "") -> dict[str, Mapping[str, Any]]:
    """Each mapping within ``content`` that has named tensors, by its dotted place."""
    found: dict[str, Mapping[str, Any]] = {}
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Mapping) or NOT_WEIGHTS.match(key):
            continue
        own = f"{place}.{key}" if place else key
        found |= {own: value} if _has_named_tensors(value) else _states(value, own)
    return found


def _has_named_tensors(content: Mapping[Any, Any]) -> bool:
    """Whether ``content`` can be a model's state: a counter or an accuracy alone, tensors of no dimension, is none."""
    return all(isinstance(key, str) for key in content) and any(
        isinstance(value, Tensor) and value.dim() > 0 for value in content.values()
    )


def _stated_by(content: Mapping[str, Any]) -> Normalization | None:
    """The normalization that a program's options, or keys beside the weights, tell of."""
    args = content.get("args")
    for holder in (vars(args) if isinstance(args, argparse.Namespace) else args, content):
        if isinstance(holder, Mapping) and (stated := normalization(holder.get(MEAN), holder.get(STD))):
            return stated
    return None


def _words(place: str) -> set[str]:
    return set(re.split(r"[._]", place))


def _below(tensors: Iterable[Any], prefix: str) -> list[str]:
    return [key for key in tensors if isinstance(key, str) and key.startswith(f"{prefix}.")]
