"""Building the network that a student's file names: by timm, or by code of the user's own where that is admitted."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from qtrain.models.factory import create_model
from qtrain.packed.header import Network
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

NUMBERS_OF_A_BYTE = 64
"""A stored byte holds at most so many of a network's numbers, on average: an eighth of a bit for each."""

NUMBERS_AT_LEAST = 1 << 24
"""So many numbers a network may have, however short the file."""


def build_network(network: Network, builders: Sequence[Builder] = (), *, stored_bytes: int | None = None) -> nn.Module:
    """The full-precision network, on the CPU in eval mode, with weights that do not matter.

    Code outside of qtrain and timm runs only where ``builders`` names it. Random numbers are left as they were. Raises
    ``ValueError`` where the network cannot be built, and where one of timm is far too large for ``stored_bytes``, which
    is found before it takes memory.
    """
    if network.builder == TIMM:
        options = _checked(network.options)
        if stored_bytes is not None:
            _check_size(options, stored_bytes)
        return built(create_model, options)
    given = {path_of(builder, importable=False): builder for builder in builders if not isinstance(builder, str)}
    # A class of the program that runs has another path there than in the program that loads the file.
    alike = [path for path in given if path.rpartition(".")[2] == network.builder.rpartition(".")[2]]
    if network.builder in given or len(alike) == 1:
        return built(given.get(network.builder) or given[alike[0]], network.options)
    if alike:
        raise ValueError(f"its network is {network.builder}, and it could be {' or '.join(alike)}; give one of them")
    admitted = admitted_names(builders)
    if network.builder.split(".")[0] == "qtrain" and network.builder not in admitted:
        # Who admits all of qtrain thinks of networks, and not of functions that call what a file names.
        raise ValueError(f"its network: {network.builder} builds no network of students")
    try:
        found = import_object(network.builder, admitted=admitted)
    except NotAdmittedError as error:
        remedy = f"if you trust it, admit it by its name, as in builders=[{network.builder.split('.')[0]!r}]"
        raise NotAdmittedError(network.builder, remedy) from error
    except ValueError as error:
        raise ValueError(f"its network: {error}") from error
    return built(found, network.options)


def admitted_names(builders: Sequence[Builder]) -> list[str]:
    """The dotted names of ``builders``."""
    return [b if isinstance(b, str) else path_of(b, importable=False) for b in builders]


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


def _check_size(options: dict[str, Any], stored_bytes: int) -> None:
    """Build the network on torch's device without memory, and raise ``ValueError`` where it has too many numbers."""
    try:
        with torch.device("meta"):
            network = built(create_model, options)
    except ValueError as error:
        if "meta tensor" in str(error):
            return  # its constructor looks at values, so that its size is not known ahead
        raise
    numbers = sum(tensor.numel() for tensor in (*network.parameters(), *network.buffers()))
    if numbers > (most := NUMBERS_AT_LEAST + NUMBERS_OF_A_BYTE * stored_bytes):
        raise ValueError(f"its network has {numbers} numbers, and {stored_bytes} bytes cannot hold more than {most}")


def _checked(options: dict[str, Any]) -> dict[str, Any]:
    for name in REFUSED:
        if options.get(name) not in (None, False):
            raise ValueError(f"its network: the option {name} would read other files; it is not followed")
    if ":" in str(options.get("name", "")):
        raise ValueError(f"its network: {options['name']} would be fetched from elsewhere; it is not followed")
    return options
