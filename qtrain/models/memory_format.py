"""In which order a model's weights and images lie in memory.

Convolutions are often faster on images whose channels are next to each other (``torch.channels_last``). But a network
that calls ``view`` on such an image dies, since ``view`` never copies. So each model is tried once on an example, and
is left contiguous where it needs that.
"""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qtrain.functional.layout import arranged
from qtrain.utils.eval_mode import evaluating

log = logging.getLogger(__name__)


def to_channels_last_(model: nn.Module, example: Tensor) -> bool:
    """Give the weights of ``model`` the format ``torch.channels_last``; whether it computes in it.

    ``example`` (N, C, H, W) are images that the model takes, on its device; N is at least 2. Where the model refuses
    them in this format and takes contiguous ones, its weights are contiguous again, and a line of the log says why. An
    error that has another cause is raised.
    """
    model.to(memory_format=torch.channels_last)
    try:
        _run(model, arranged(example, channels_last=True))
    except RuntimeError as error:
        model.to(memory_format=torch.contiguous_format)
        _run(model, arranged(example, channels_last=False))
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        log.info(
            "%s: stays contiguous in memory, and so do its images: it does not compute in channels_last (%s); calling "
            "reshape or flatten in place of view allows the faster format",
            type(model).__name__,
            reason,
        )
        return False
    return True


def format_for(models: Sequence[nn.Module]) -> torch.memory_format:
    """The format for images that all ``models`` take: ``torch.channels_last`` if the weights of all of them have it."""
    together = models and all(_is_channels_last(model) for model in models)
    return torch.channels_last if together else torch.contiguous_format


def _is_channels_last(model: nn.Module) -> bool:
    """Whether a weight of ``model`` is in channels_last; many shapes, such as those of 1x1 kernels, are in both."""
    return any(
        weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
        for weight in model.parameters()
    )


def _run(model: nn.Module, example: Tensor) -> None:
    with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
        model(example)
