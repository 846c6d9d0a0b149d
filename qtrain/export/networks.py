"""Building the network that a student's file names: by timm, or by code of the user's own where that is admitted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from qtrain.export.header import Network
from qtrain.models.factory import create_model
from qtrain.utils.importing import NotAdmittedError, import_object, path_of
from qtrain.utils.user_code import explained

TIMM = path_of(create_model)
"""The builder of all networks of timm and of the CIFAR ResNets."""

REFUSED = (
    "weights", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "reset_head",
)  # fmt: skip
"""Options of timm that read other files or fetch some; a student has its own weights."""

Builder = str | Callable[..., nn.Module]
"""A class or function, or the dotted name of one or of its package."""


def build_network(network: Network, builders: Sequence[Builder] = ()) -> nn.Module:
    """The full-precision network, on the CPU in eval mode, with weights that do not matter.

    Code outside of qtrain and timm runs only where ``builders`` names it. Random numbers are left as they were. Raises
    ``ValueError`` where the network cannot be built.
    """
    if network.builder == TIMM:
        return built(create_model, _checked(network.options))
    given = [builder for builder in builders if not isinstance(builder, str)]
    for builder in given:
        path = path_of(builder, importable=False)
        # A class of the program that runs has another path there than in the program that loads the file.
        if network.builder == path or network.builder.rpartition(".")[2] == path.rpartition(".")[2]:
            return built(builder, network.options)
    admitted = [builder for builder in builders if isinstance(builder, str)]
    try:
        found = import_object(network.builder, admitted=admitted)
    except NotAdmittedError as error:
        remedy = f"admit it by its name, as in builders=[{network.builder.split('.')[0]!r}]"
        raise NotAdmittedError(network.builder, remedy) from error
    except ValueError as error:
        raise ValueError(f"its network: {error}") from error
    return built(found, network.options)


def built(builder: Callable[..., Any], options: dict[str, Any]) -> nn.Module:
    """What ``builder`` makes of ``options``. Raises ``ValueError`` where that is no network."""
    with torch.random.fork_rng(devices=[]):
        try:
            made = builder(**options)
        except Exception as error:  # code of the user's own may raise any
            raise ValueError(f"its network cannot be built with the options {options}: {explained(error)}") from error
    if not isinstance(made, nn.Module):
        raise ValueError(f"its network: {path_of(builder)} gives a {type(made).__name__}, not a torch.nn.Module")
    return made.eval()


def _checked(options: dict[str, Any]) -> dict[str, Any]:
    for name in REFUSED:
        if options.get(name) not in (None, False):
            raise ValueError(f"its network: the option {name} would read other files; it is not followed")
    if ":" in str(options.get("name", "")):
        raise ValueError(f"its network: {options['name']} would be fetched from elsewhere; it is not followed")
    return options
