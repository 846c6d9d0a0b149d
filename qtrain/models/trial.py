"""One forward of a network that others wrote, before anything rests on it: what fails there is one line."""

import torch
from torch import Tensor, nn

from qtrain.utils.eval_mode import evaluating
from qtrain.utils.user_code import SEE_MORE, explained


def placed(images: Tensor, model: nn.Module) -> Tensor:
    """``images`` on the device and in the dtype of ``model``; as they are where it has no parameters of floats."""
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    return images if first is None else images.to(first)


@torch.no_grad()
def answer(model: nn.Module, images: Tensor, *, where: str, hint: str = "") -> object:
    """What ``model`` gives for ``images`` in eval mode; torch's random state on the CPU stays as it is.

    Raises ``ValueError`` that begins with ``where`` and ends with ``hint`` if the network fails.
    """
    with evaluating(model), torch.random.fork_rng(devices=[]):
        try:
            return model(images)
        except Exception as error:
            kind, shape = type(model).__name__, tuple(images.shape)
            raise ValueError(f"{where}: {kind} fails on images {shape}: {explained(error)}{hint}{SEE_MORE}") from error


def tensor_of(model: nn.Module, images: Tensor, *, where: str) -> Tensor:
    """The one tensor that ``model`` gives for ``images``. Raises ``ValueError`` where it gives something else."""
    logits = answer(model, images, where=where)
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"{where}: {type(model).__name__} must give logits (N, classes), got a value of type "
            f"{type(logits).__name__}; wrap the network in one whose forward gives these alone"
        )
    return logits


def logits_of(model: nn.Module, images: Tensor, *, where: str, classes: int | None = None, hint: str = "") -> Tensor:
    """The logits (N, classes) that ``model`` gives for ``images``, N of them.

    Raises ``ValueError`` where it gives something else, or, if ``classes`` are given, as many others; ``hint`` ends the
    line then.
    """
    logits, kind = tensor_of(model, images, where=where), type(model).__name__
    if logits.ndim != 2 or len(logits) != len(images) or classes not in (None, logits.shape[1]):
        expected = f"({len(images)}, {'classes' if classes is None else classes})"
        raise ValueError(
            f"{where}: {kind} must give logits {expected} for images {tuple(images.shape)}, got "
            f"{tuple(logits.shape)}{hint and f'; {hint}'}"
        )
    return logits
