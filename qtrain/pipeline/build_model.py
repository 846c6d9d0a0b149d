"""Full-precision models for the images that a data set has."""

from __future__ import annotations

import torch
from torch import nn

from qtrain.export.header import Network
from qtrain.models.own import arguments_for, build_own
from qtrain.models.weights import load_weights
from qtrain.settings.component import Component
from qtrain.spec import DataInfo
from qtrain.utils.errors import as_config_error
from qtrain.utils.user_code import BuilderPath, parameters_of

UNBUILT = ("weights", "pretrained", "reset_head")
"""Options of a model that say where its weights come from."""


def build_model(chosen: Component, info: DataInfo, *, weights: str | None = None) -> nn.Module:
    """The full-precision model ``chosen`` (``settings.model``, a teacher's) for the data's classes and channels.

    What builds it gets ``num_classes``, ``in_channels`` and ``image_size`` of the data if it takes them by these names.
    ``weights`` stands in for the component's own where it names none.
    """
    offered = {**_facts(info), **({} if weights is None else {"weights": weights})}
    taken = parameters_of(chosen.target)
    given = {name: value for name, value in offered.items() if name in taken}
    made = chosen.build(**given)
    with as_config_error(chosen.key):
        model: nn.Module = made() if chosen.partial else made
        if weights is not None and "weights" not in taken:
            load_weights(model, weights)
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
