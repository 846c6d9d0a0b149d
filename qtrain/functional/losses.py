"""Losses as pure functions of tensors; each serves as a term of the objective and as a metric alike."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def hard_loss(logits: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy, mean over the batch, in nats.

    ``logits`` (N, K); ``target`` (N,) class indices or (N, K) probabilities.
    """
    return F.cross_entropy(logits.float(), target, label_smoothing=label_smoothing)


def soft_target_loss(logits: Tensor, teacher_logits: Tensor, temperature: Tensor | float) -> Tensor:
    """``T^2 KL(softmax(teacher / T) || softmax(student / T))``, mean over the batch, in nats.

    Both (N, K). The factor T^2 keeps the gradient's size as T changes, since the softened gradient falls with
    1/T^2 (Hinton et al. 2015, arXiv 1503.02531, §2). Non-negative; zero exactly where the two agree.
    """
    student = F.log_softmax(logits.float() / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=1)
    divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1).mean()
    return divergence * temperature**2


def hint_loss(guided: Tensor, hint: Tensor) -> Tensor:
    """``1/2 mean((hint - guided)^2)`` over all elements (FitNets, Romero et al. 2015, arXiv 1412.6550, eq. 3).

    ``guided`` is the regressor's output on the student's layer, of the shape of the teacher's ``hint``. The paper
    sums over the elements of a sample; the mean makes one weight fit layers of any size.
    """
    return 0.5 * F.mse_loss(guided.float(), hint.float())
