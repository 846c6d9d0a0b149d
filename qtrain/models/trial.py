"""One forward of a network that others wrote, before anything rests on it: what fails there is one line."""

import torch
from torch import Tensor, nn

from qtrain.utils.eval_mode import evaluating
from qtrain.utils.user_code import SEE_MORE, explained


@torch.no_grad()
def answer(model: nn.Module, images: Tensor, *, where: str, hint: str = "") -> object:
    """What ``model`` gives for ``images`` in eval mode; torch's random state stays as it is.

    Raises ``ValueError`` that begins with ``where`` and ends with ``hint`` if the network fails.
    """
    with evaluating(model), torch.random.fork_rng(devices=[]):
        try:
            return model(images)
        except Exception as error:
            kind, shape = type(model).__name__, tuple(images.shape)
            raise ValueError(f"{where}: {kind} fails on images {shape}: {explained(error)}{hint}{SEE_MORE}") from error


def check_logits(model: nn.Module, images: Tensor, classes: int, *, where: str, hint: str) -> None:
    """Raise ``ValueError`` unless ``model`` gives logits (N, classes) for ``images``; ``hint`` ends the line."""
    logits, kind = answer(model, images, where=where), type(model).__name__
    if not isinstance(logits, Tensor):
        raise ValueError(f"{where}: {kind} must give logits (N, classes), got a value of type {type(logits).__name__}")
    if logits.shape != (len(images), classes):
        raise ValueError(
            f"{where}: {kind} must give logits {(len(images), classes)} for images {tuple(images.shape)}, got "
            f"{tuple(logits.shape)}; {hint}"
        )
