"""Full-precision models for the images that a data set has."""

import logging
from functools import cache

import torch
from torch import nn

from qtrain.models.normalization import Normalization, stated_normalization
from qtrain.models.own import arguments_for, build_own
from qtrain.models.weights import load_weights
from qtrain.packed.header import Network
from qtrain.settings.component import Component
from qtrain.spec import DataInfo
from qtrain.utils.errors import as_config_error
from qtrain.utils.user_code import BuilderPath, parameters_of

UNBUILT = ("weights", "state", "keys", "mean", "std", "pretrained", "reset_head")
"""Options of a model that say where its weights come from, and on what images they were trained."""

log = logging.getLogger(__name__)


def build_model(
    chosen: Component, info: DataInfo, *, weights: str | None = None, seen: Normalization | None = None
) -> nn.Module:
    """The full-precision model ``chosen`` (``settings.model``, a teacher's) for the data's classes and channels.

    What builds it gets ``num_classes``, ``in_channels`` and ``image_size`` of the data if it takes them by these names.
    ``weights`` stands in for the component's own where it names none. ``seen`` is the normalization of the images that
    the model will get, where it is not the data's; a warning says if the component's weights expect another.
    """
    offered = {**_facts(info), **({} if weights is None else {"weights": weights})}
    taken = parameters_of(chosen.target)
    given = {name: value for name, value in offered.items() if name in taken}
    made = chosen.build(**given)
    with as_config_error(chosen.key):
        model: nn.Module = made() if chosen.partial else made
        if weights is not None and "weights" not in taken:
            load_weights(model, weights)
    if has_weights(chosen):
        _compare(chosen, stated_normalization(model), seen or Normalization(tuple(info.mean), tuple(info.std)))
    return model


def network_of(chosen: Component, info: DataInfo) -> Network:
    """How the model ``chosen`` is built for these data, without its weights."""
    if chosen.target is build_own:
        builder = BuilderPath(builder_of(chosen))
        return Network(builder, arguments_for(builder, chosen.get("options") or {}, _facts(info)))
    options = {name: value for name, value in chosen.plain.items() if name not in (*UNBUILT, "_target_", "_partial_")}
    taken = parameters_of(chosen.target)
    options |= {name: value for name, value in _facts(info).items() if name in taken}
    return Network(builder_of(chosen), options)


def builder_of(chosen: Component) -> str:
    """The dotted path of what builds the model ``chosen``."""
    return str(chosen.plain["builder" if chosen.target is build_own else "_target_"])


def _facts(info: DataInfo) -> dict[str, object]:
    return {"num_classes": info.num_classes, "in_channels": info.in_channels, "image_size": info.image_size}


def has_weights(chosen: Component) -> bool:
    """Whether the model ``chosen`` comes with trained weights: from a file, or from its package."""
    return chosen.get("weights") is not None or bool(chosen.get("pretrained", False))


def example_input(info: DataInfo, size: int = 1) -> torch.Tensor:
    """A zero image batch (size, C, H, W) of the data's shape."""
    return torch.zeros(size, info.in_channels, info.image_size, info.image_size)


def _compare(chosen: Component, stated: Normalization | None, seen: Normalization) -> None:
    """Warn where weights meet images of another normalization. One channel tells nothing of three, nor the reverse."""
    if stated is None or len(stated.mean) != len(seen.mean) or stated.agrees(seen):
        return
    section = "teacher" if chosen.key.startswith("teacher") else "data"
    _warn_once(
        f"{chosen.key}: the weights expect images with mean {_listed(stated.mean)} and std {_listed(stated.std)}, and "
        f"get mean {_listed(seen.mean)} and std {_listed(seen.std)}, which costs accuracy: give "
        f"{stated.as_overrides(section)}, or say by {chosen.key}.mean and {chosen.key}.std if that is not so"
    )


@cache
def _warn_once(message: str) -> None:
    log.warning(message)


def _listed(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)
