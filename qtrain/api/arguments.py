"""What callers hand to ``import qtrain``, looked at before anything is done: a wrong argument is one line."""

from collections.abc import Collection, Iterable, Mapping
from itertools import islice
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from qtrain.convert.plan import Policy
from qtrain.spec import Allocation, Granularity, LayerBits

Images = Tensor | Iterable[Any]
"""A batch of images (N, C, H, W), normalized as in training; or batches, each images or (images, labels)."""


def check_network(where: str, model: object) -> None:
    """Raise ``ValueError`` unless ``model`` is a network."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"{where} must be a network, a torch.nn.Module, got {_shown(model)}")


def check_mapping(where: str, given: object, example: str) -> None:
    """Raise ``ValueError`` unless ``given`` is a mapping, such as ``example``, or ``None``."""
    if not isinstance(given, Mapping | None):
        raise ValueError(f"{where} must be a mapping such as {example}, got {_shown(given)}")


def check_policies(policies: Mapping[str, object] | None) -> None:
    """Raise ``ValueError`` unless each of ``policies`` is one."""
    check_mapping("quantize: policies", policies, "{'name': qtrain.Policy(...)}")
    for name, own in (policies or {}).items():
        if not isinstance(own, Policy):
            raise ValueError(f"quantize: policies: {name!r} must be a qtrain.Policy, got {_shown(own)}")


def check_choices(choices: Mapping[str, object]) -> None:
    """Raise ``ValueError`` for a choice of :func:`qtrain.quantize` that is no name and makes nothing."""
    for name, choice in choices.items():
        made = isinstance(choice, Granularity) if name == "granularity" else callable(choice)
        if not (choice is None or isinstance(choice, str) or made):
            kind = "an object of qtrain.spec" if name == "granularity" else "what makes it, such as a class"
            raise ValueError(
                f"quantize: {name} is a name from conf/ or {kind}, got {_shown(choice)}; weight_bits and input_bits "
                "are widths"
            )


def allocation_of(bits: Mapping[str, LayerBits | tuple[int, int]]) -> Allocation:
    """The bits of each layer by its name. Raises ``ValueError`` where they are not two whole numbers each."""
    if not isinstance(bits, Mapping):
        raise ValueError(
            f"quantize: bits is a search's name or the bits of each layer by its name, got {_shown(bits)}; weight_bits "
            "and input_bits are those of all layers"
        )
    for name, both in bits.items():
        if not (
            isinstance(both, tuple | list) and len(both) == 2 and all(isinstance(width, Integral) for width in both)
        ):
            raise ValueError(f"quantize: bits of {name!r} must be two, (weight, input), got {_shown(both)}")
    return {name: LayerBits(*map(int, both)) for name, both in bits.items()}


def check_widths(widths: object, ends: object) -> None:
    """Raise ``ValueError`` unless ``widths`` are several or ``None``, and ``ends`` two or ``None``."""
    if not isinstance(widths, Collection | None) or isinstance(widths, str):
        raise ValueError(
            f"quantize: widths are those of one student of many bits, such as [8, 4, 2], got {_shown(widths)}"
        )
    if ends is not None and not (isinstance(ends, tuple | list) and len(ends) == 2):
        raise ValueError(
            f"quantize: ends are the two widths of first and last layer, such as (8, 8), got {_shown(ends)}"
        )


def readable(images: Images) -> Images:
    """``images``, whose batches can be gone through. Raises ``ValueError`` where that is not so."""
    try:
        iter(images)
    except TypeError as error:
        raise ValueError(f"quantize: images must be a tensor, or batches of images, got {_shown(images)}") from error
    return images


def first_batches(images: Images, count: int) -> list[Tensor]:
    """The images of the first ``count`` batches. Raises ``ValueError`` where there are none, or no batches of floats.

    Whole numbers are refused, since they are images before normalization.
    """
    given: Iterable[Any] = [images] if isinstance(images, Tensor) else images
    found = [images_and_labels("quantize", batch)[0] for batch in islice(given, count)]
    if not found:
        raise ValueError("quantize: images must be a tensor, or batches of images, got nothing")
    for batch in found:
        if not batch.numel():
            raise ValueError(f"quantize: a batch of images has shape {tuple(batch.shape)}; give one that is not empty")
    return found


def images_and_labels(where: str, batch: Any) -> tuple[Tensor, Tensor | None]:
    """A batch of images, or of (images, labels), as both; ``None`` for labels that there are not, or no numbers (N,).

    Raises ``ValueError`` that begins with ``where`` for anything else, and for images of whole numbers.
    """
    images, labels, *_ = (*batch, None, None) if isinstance(batch, tuple | list) else (batch, None)
    if not isinstance(images, Tensor):
        raise ValueError(
            f"{where}: images must be a tensor, or batches of tensors or (images, labels), got {_shown(images)}"
        )
    if not images.is_floating_point():
        raise ValueError(f"{where}: images must be floats, normalized as in training, got {images.dtype}")
    return images, labels if isinstance(labels, Tensor) and labels.ndim == 1 else None


def hint_for(shape: torch.Size) -> str:
    """What to say beside the error of a network that failed on images of ``shape``."""
    return "; give batches (N, C, H, W): a DataLoader in the place of a dataset" if len(shape) == 3 else ""


def _shown(value: object, most: int = 60) -> str:
    """``value`` in a line: as it is written where it is plain, otherwise its kind."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    plain = isinstance(value, str | int | float | tuple | list | dict)
    text = " ".join(repr(value).split()) if plain else f"a {type(value).__name__}"
    return text if len(text) <= most else f"{text[:most]}..."
