"""A network of the user's own: any class or function that gives a ``torch.nn.Module``.

A config says how it is built by two plain values, the dotted path ``builder`` and the ``options`` to call it with, so
that whoever reads the config can build it again.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from qtrain.models.trial import logits_of
from qtrain.models.weights import WeightSource
from qtrain.utils.user_code import BuilderPath, call_builder, import_builder, parameters_of

EXAMPLES = 2
"""Images that a new network is tried on."""


def build_own(
    *,
    builder: BuilderPath,
    options: Mapping[str, object] | None = None,
    name: str | None = None,
    weights: str | None = None,
    state: str | None = None,
    keys: Mapping[str, str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    pretrained: bool = False,
    num_classes: int | None = None,
    in_channels: int | None = None,
    image_size: int | None = None,
) -> nn.Module:
    """The network that ``builder``, called with ``options``, gives for images (N, in_channels, image_size, image_size).

    The builder gets ``num_classes``, ``in_channels`` and ``image_size`` where its signature has parameters of these
    names; ``options`` win over them. ``weights`` is a file, ``state`` which of the weights in it, ``keys`` parts of its
    keys to rename (see ``load_weights``). ``pretrained`` says that the network comes trained from its builder. ``mean``
    and ``std`` say on what images it was trained. ``name`` is what tables call it.

    Where the three facts are known, the network is tried on zero images. Raises ValueError, in one line, where the
    builder cannot be imported or called, gives no network, or the network does not answer with logits (N, num_classes).
    """
    source = WeightSource(owner="build_own", weights=weights, state=state, keys=keys, mean=mean, std=std)
    facts = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
    model = call_builder(builder, arguments_for(builder, options or {}, facts))
    if not isinstance(model, nn.Module):
        raise ValueError(f"{builder} must give a torch.nn.Module, got {_kind(model)}")
    if not any(True for _ in model.parameters()):
        raise ValueError(f"{builder}: {type(model).__name__} has no parameters, and so nothing to quantize")
    if num_classes is not None and in_channels is not None and image_size is not None:
        images = torch.zeros(EXAMPLES, in_channels, image_size, image_size)
        hint = f"the data have {num_classes} classes, which a parameter num_classes is told"
        logits_of(model, images, where=builder, classes=num_classes, hint=hint)
    source.fill_(model)
    return model


def arguments_for(
    builder: BuilderPath, options: Mapping[str, object], facts: Mapping[str, object]
) -> dict[str, object]:
    """All that ``builder`` is to be called with: ``options``, and those of ``facts`` that its signature names.

    With these arguments it gives the same network again, wherever it can be imported. Raises ValueError for an option
    that is no plain value (number, word, list or mapping of them).
    """
    for key, value in options.items():
        _check_plain(key, value)
    taken = parameters_of(import_builder(builder))
    return {**{key: value for key, value in facts.items() if key in taken and value is not None}, **options}


def _check_plain(key: str, value: object) -> None:
    if isinstance(value, Mapping):
        for inner, own in value.items():
            _check_plain(f"{key}.{inner}", own)
    elif isinstance(value, list | tuple):
        for number, own in enumerate(value):
            _check_plain(f"{key}.{number}", own)
    elif not (value is None or isinstance(value, bool | int | float | str)):
        raise ValueError(f"options.{key} must be a plain value (number, word, list or mapping), got {_kind(value)}")


def _kind(value: object) -> str:
    return f"a value of type {type(value).__name__}"
