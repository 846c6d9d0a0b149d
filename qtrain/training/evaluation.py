"""Accuracy of a model on a loader, outside of a fit: of the full-precision, calibrated or final model."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from qtrain.functional.losses import hard_loss
from qtrain.spec import Batch
from qtrain.utils.eval_mode import evaluating


@final
@dataclass(frozen=True)
class Evaluation:
    """``top1`` in percent, ``loss`` (cross-entropy) in nats, and ``right`` (N,): which images got their own class.

    Images are in the order of their numbers in the data set, so that two models can be compared image by image.
    """

    top1: float
    loss: float
    right: NDArray[np.bool_]

    @property
    def metrics(self) -> dict[str, float]:
        return {"top1": self.top1, "loss": self.loss}


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch], device: torch.device) -> Evaluation:
    """How good ``model`` is in eval mode, over all of ``batches``.

    If each rank has a slice of the batches, all ranks get what holds for the whole. The model stays on ``device``; the
    modes of its modules are restored. Values stay on the device until the end.
    """
    model.to(device)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    numbers, found = [], []
    with evaluating(model):
        for batch in batches:
            image, target = batch.image.to(device), batch.target.to(device)
            logits = model(image)
            loss += hard_loss(logits, target).double() * len(target)
            numbers.append(batch.index)
            found.append(logits.argmax(dim=1) == target)
    index, right = _of_all_ranks(torch.cat(numbers).cpu(), torch.cat(found).cpu())
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(loss)
    ordered = right[index.argsort()].numpy()
    return Evaluation(top1=100 * int(ordered.sum()) / len(ordered), loss=float(loss) / len(ordered), right=ordered)


def _of_all_ranks(*parts: Tensor) -> tuple[Tensor, ...]:
    """The tensors (n, ...) of all ranks, one after another; ranks may have different ``n``."""
    if not (dist.is_available() and dist.is_initialized()):
        return parts
    gathered: list[tuple[Tensor, ...]] = [()] * dist.get_world_size()
    dist.all_gather_object(gathered, parts)
    return tuple(torch.cat(same) for same in zip(*gathered, strict=True))
