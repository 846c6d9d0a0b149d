"""Weights from a file into a model: keys renamed, prefixes taken off, and the model changed only if all fits."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from torch import Tensor, nn

from qtrain.models.normalization import Normalization, normalization, state_normalization_
from qtrain.models.weight_file import read_weight_file
from qtrain.utils.sharing import completed
from qtrain.utils.suggestions import did_you_mean

log = logging.getLogger(__name__)

PREFIXES = ("student.", "module.", "model.", "_orig_mod.")
KEYS_SHOWN = 8


@final
@dataclass(frozen=True, kw_only=True)
class WeightSource:
    """Where a model's weights come from, and on what images they were trained.

    ``weights``, ``state`` and ``keys`` as for :func:`load_weights`; ``mean`` and ``std`` have a value for each channel
    of pixels in [0, 1] and stand in for what the file says. ``owner`` is what messages call the one who asks. Raises
    ValueError where they do not go together.
    """

    owner: str
    weights: str | None
    state: str | None = None
    keys: Mapping[str, str] | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if (self.mean, self.std) != (None, None) and normalization(self.mean, self.std) is None:
            raise ValueError(
                f"{self.owner}: mean and std are two lists with a number in [0, 1] for each channel, got {self.mean} "
                f"and {self.std}; give both, or neither"
            )
        if self.weights is None and (self.state is not None or self.keys):
            raise ValueError(f"{self.owner}: state and keys say how to read a file of weights; give one as `weights`")

    def fill_(self, model: nn.Module, *, reset_head: bool = False) -> None:
        """Load the weights into ``model``, if there are some; its ``pretrained_cfg`` then has their normalization."""
        stated = normalization(self.mean, self.std)
        if self.weights is not None:
            found = load_weights(model, self.weights, reset_head=reset_head, state=self.state, keys=self.keys)
            stated = stated or found
            log.info("%s: weights from %s", type(model).__name__, self.weights)
        if stated is not None:
            state_normalization_(model, stated)


def load_weights(
    model: nn.Module,
    path: str | Path,
    *,
    reset_head: bool = False,
    state: str | None = None,
    keys: Mapping[str, str] | None = None,
) -> Normalization | None:
    """Fill ``model`` with the weights in ``path``; their keys must be exactly those of the model, each of the right
    shape. Of a tensor that several modules share, one name is enough. Returns the normalization of images that the file
    states, if it does.

    ``state`` says which weights of a file with several (see :func:`read_weight_file`). ``keys`` maps parts of the
    file's keys to what stands there in the model's: ``{"downsample": "shortcut"}``. The prefixes of DDP, Lightning and
    torch.compile (``module.``, ``student.``, ``model.``, ``_orig_mod.``) are taken off. With ``reset_head`` a
    classifier for another number of classes is not an error: the head starts afresh, and the log says so.

    Raises FileNotFoundError, or ValueError for a file that is damaged, holds code, or does not fit.
    """
    path = Path(path)
    file = read_weight_file(path, state=state)
    check_finite(file.tensors, path)
    own = model.state_dict()
    tensors = completed(strip_prefixes(renamed(file.tensors, keys or {}, path), own=set(own)), own)
    fresh = _other_heads(model, tensors) if reset_head else {}
    tensors = {key: value for key, value in tensors.items() if not key.startswith(tuple(f"{name}." for name in fresh))}
    tensors |= {key: own[key] for keys in fresh.values() for key in keys}
    missing = [key for key in own if key not in tensors and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in tensors if key not in own]
    reshaped = [
        f"{key} (file {tuple(tensors[key].shape)}, model {tuple(own[key].shape)})"
        for key in own
        if key in tensors and tensors[key].shape != own[key].shape
    ]
    wrong = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    if any(wrong.values()):
        parts = "; ".join(f"{len(keys)} {what}: {_some(keys)}" for what, keys in wrong.items() if keys)
        raise ValueError(
            f"load_weights: {path} does not fit {type(model).__name__}: {parts}; "
            f"{_remedy(model, missing, unexpected, reshaped, file.others)}"
        )
    model.load_state_dict(tensors, strict=False)  # only counters may be missing
    for name in fresh:
        log.info("weights: %s has another head than %s; %r starts afresh", path, type(model).__name__, name)
        for module in model.get_submodule(name).modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.reset_parameters()
    return file.normalization


def check_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise ``ValueError`` for the first of the ``tensors`` in the file ``path`` with values that are not finite."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(
                f"{path}: tensor {name!r} holds values that are not finite (NaN or infinite); give a file of a "
                "training that went well"
            )


def renamed(tensors: Mapping[str, Tensor], parts: Mapping[str, str], path: Path) -> dict[str, Tensor]:
    """``tensors`` with each of ``parts`` replaced in their keys, one after the other.

    Raises ValueError for a part that no key has, and where two keys become one.
    """
    tensors = dict(tensors)
    for old, new in parts.items():
        if not any(old in key for key in tensors):
            words = {word for key in tensors for word in key.split(".")}
            hint = did_you_mean(old, words) or f"; the keys are {_some([*tensors])}"
            raise ValueError(f"load_weights: keys: no key of {path} contains {old!r}{hint}")
        before, tensors = tensors, {key.replace(old, new): value for key, value in tensors.items()}
        if len(tensors) < len(before):
            raise ValueError(
                f"load_weights: keys: with {new!r} in place of {old!r}, {len(before) - len(tensors)} keys of {path} "
                "become the same as others; give a longer part"
            )
    return tensors


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


def _other_heads(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """The classifiers of ``model`` that ``state`` lacks or has for another number of classes, with their keys."""
    own = model.state_dict()
    keys = {name: [key for key in own if key.startswith(f"{name}.")] for name in head_names(model)}
    return {
        name: of
        for name, of in keys.items()
        if not all(key in state and state[key].shape == own[key].shape for key in of)
    }


def _remedy(
    model: nn.Module, missing: list[str], unexpected: list[str], reshaped: list[str], others: tuple[str, ...]
) -> str:
    """What to try where a file does not fit."""
    if all(key.startswith(head_names(model)) for key in (*missing, *unexpected, *reshaped)):
        return "set reset_head=true to take all but the head"
    remedy = "check the model's name and options"
    if missing and unexpected and not reshaped:
        remedy += "; keys={OLD: NEW} renames parts of the file's keys"
    return remedy + (f"; state=NAME takes other weights of the file: {', '.join(others)}" if others else "")


def _has(keys: Iterable[str], prefix: str) -> bool:
    return any(key.startswith(prefix) for key in keys)


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:KEYS_SHOWN]) + (", ..." if len(keys) > KEYS_SHOWN else "")
