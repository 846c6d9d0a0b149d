"""Accuracy of a model on a loader, outside of a fit: of the full-precision, calibrated or final model."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from qtrain.functional.losses import hard_loss
from qtrain.spec import Batch
from qtrain.utils.eval_mode import evaluating


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch], device: torch.device) -> dict[str, float]:
    """``top1`` in percent and ``loss`` (cross-entropy in nats) of ``model`` in eval mode, over all of ``batches``.

    If each rank has a slice of the batches, all ranks get the metrics of the whole. The model stays on ``device``; the
    modes of its modules are restored. Values stay on the device until the end.
    """
    model.to(device)
    totals = torch.zeros(3, dtype=torch.float64, device=device)
    with evaluating(model):
        for batch in batches:
            image, target = batch.image.to(device), batch.target.to(device)
            logits = model(image)
            size = len(target)
            correct = (logits.argmax(dim=1) == target).sum()
            totals += torch.stack(
                [correct.double(), hard_loss(logits, target).double() * size, totals.new_tensor(size)]
            )
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(totals)
    correct_sum, loss_sum, count = totals.tolist()
    return {"top1": 100 * correct_sum / count, "loss": loss_sum / count}
