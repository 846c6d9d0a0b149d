"""Losses as pure functions of tensors; each serves both as a term of the objective and as a metric.

All are means over the batch, 0-dim, computed in float32 (float64 stays float64) whatever the precision around them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from qtrain.functional.precision import full_precision
from qtrain.functional.ranks import mean_of_ranks
from qtrain.spec import NO_LABEL

NO_LENGTH = 1e-6
"""A row of so small a share of the longest one's length has no direction, only rounding errors."""


def hard_loss(logits: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy, mean over the batch, in nats.

    ``logits`` (N, K); ``target`` (N,) class indices or (N, K) probabilities p. Smoothing makes them ``(1 - eps) p +
    eps / K``. A class with p = 0 adds nothing, also where its logit is -inf. An image of class :data:`NO_LABEL` has the
    loss 0 and counts in the mean, so that the mean over ranks is that of one process.
    """
    if not target.is_floating_point():
        losses = F.cross_entropy(
            _wide(logits), target, ignore_index=NO_LABEL, reduction="sum", label_smoothing=label_smoothing
        )
        return losses / len(target)
    log_q, p = F.log_softmax(_wide(logits), dim=1), target.to(_wide(logits))
    if label_smoothing > 0:
        p = (1 - label_smoothing) * p + label_smoothing / p.shape[1]
    return -(p * log_q.masked_fill(p == 0, 0.0)).sum() / len(p)


def soft_target_loss(logits: Tensor, teacher_logits: Tensor, temperature: Tensor | float) -> Tensor:
    """``T^2 KL(softmax(teacher / T) || softmax(student / T))``, mean over the batch, in nats.

    Both (N, K). The factor T^2 keeps the gradient's size as T changes, since the softened gradient falls with
    1/T^2 (Hinton et al. 2015, arXiv 1503.02531, §2). Non-negative; zero exactly where the two agree. A class that the
    teacher excludes, by a logit of -inf, adds nothing: ``0 log 0 = 0``.
    """
    student = F.log_softmax(_wide(logits) / temperature, dim=1)
    teacher = F.log_softmax(_wide(teacher_logits) / temperature, dim=1)
    absent = teacher.exp() == 0
    student, teacher = student.masked_fill(absent, 0.0), teacher.masked_fill(absent, 0.0)  # the two cancel
    divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1).mean()
    return divergence * temperature**2


def hint_loss(guided: Tensor, hint: Tensor) -> Tensor:
    """``1/2 mean((hint - guided)^2)`` over all elements (FitNets, Romero et al. 2015, arXiv 1412.6550, eq. 3).

    ``guided`` is the regressor's output on the student's layer, of the shape of the teacher's ``hint``. The paper
    sums over the elements of a sample; the mean makes one weight fit layers of any size.
    """
    return 0.5 * F.mse_loss(_wide(guided), _wide(hint))


def relative_squared_error(x: Tensor, reference: Tensor) -> Tensor:
    """``mean((x - reference)^2) / mean(reference^2)``, both of one shape: 0 for equal, 1 for ``x = 0``.

    The result does not depend on the reference's unit, so blocks whose outputs differ in size count equally.
    ``mean(reference^2)`` is taken over the slices of all ranks.
    """
    x, reference = _wide(x), _wide(reference)
    energy = mean_of_ranks(reference.square().mean()).clamp(min=torch.finfo(reference.dtype).tiny)
    return F.mse_loss(x, reference) / energy


def attention_map(x: Tensor) -> Tensor:
    """``q = vec(sum_c x_c^2)``, of Euclidean length 1 for each sample: (N, C, H, W) to (N, H W), (N, L, C) to (N, L).

    The mapping F^2_sum of Zagoruyko and Komodakis 2017 (arXiv 1612.03928, §3.1): where a layer is active.
    """
    x = _wide(x)
    energy = x.square().sum(dim=-1 if x.ndim == 3 else 1)
    return F.normalize(energy.flatten(1), dim=1)


def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """``1/2 mean((q_student - q_teacher)^2)`` over samples and places, with the maps of :func:`attention_map`.

    Both have the same places and any number of channels; a factor on either side changes nothing. arXiv 1612.03928, eq.
    2 with p = 2 and the norm squared. The paper divides its beta = 1000 by the number of places and by the batch size,
    which is the mean here, so that 1000 is the weight of the term.
    """
    return 0.5 * F.mse_loss(attention_map(student), attention_map(teacher))


def similarity_matrix(x: Tensor) -> Tensor:
    """``G = Q Q^T``, (N, N), each row scaled to Euclidean length 1; the rows of Q are the samples of ``x`` (N, ...)."""
    rows = _wide(x).flatten(1)
    with full_precision(rows):
        return _directions(rows @ rows.T)


def similarity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """``1/N^2 |G_student - G_teacher|_F^2`` with :func:`similarity_matrix` (Tung and Mori 2019, arXiv 1907.09682, §3).

    Both (N, ...), of any shapes: samples that are similar for the teacher should be similar for the student. A rotation
    of either's features, or a factor on them, changes nothing.
    """
    return F.mse_loss(similarity_matrix(student), similarity_matrix(teacher))


def relational_distances(x: Tensor) -> Tensor:
    """Distances of the samples of ``x`` (N, D), over the mean distance of two of them; (N, N), zero on the diagonal."""
    x = _wide(x)
    distance = torch.linalg.vector_norm(x.unsqueeze(0) - x.unsqueeze(1), dim=2)
    mean = distance.sum() / max(1, len(x) * (len(x) - 1))
    relative: Tensor = distance / mean.clamp(min=torch.finfo(x.dtype).tiny)
    return relative


def relational_angles(x: Tensor) -> Tensor:
    """Cosine of the angle at sample i between samples j and k, at (i, j, k), for ``x`` (N, D); zero where i is j or k.

    N^3 numbers, from N^2 directions of D numbers each.
    """
    x = _wide(x)
    directions = _directions(x.unsqueeze(0) - x.unsqueeze(1))
    with full_precision(directions):
        return directions @ directions.transpose(1, 2)


def relational_distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber loss between both's :func:`relational_distances`, mean over pairs of different samples.

    RKD-D of Park et al. 2019 (arXiv 1904.05068, §3.2.1). ``student`` (N, D), ``teacher`` (N, D'). Moving, turning
    and scaling either's samples changes nothing. Zero for fewer than two samples.
    """
    n = len(student)
    differences = F.smooth_l1_loss(relational_distances(student), relational_distances(teacher), reduction="sum")
    return differences / max(1, n * (n - 1))


def relational_angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber loss between both's :func:`relational_angles`, mean over triples of different samples.

    RKD-A of Park et al. 2019 (arXiv 1904.05068, §3.2.2); shapes and invariances are those of the distances. Zero for
    fewer than three samples.
    """
    n = len(student)
    differences = F.smooth_l1_loss(relational_angles(student), relational_angles(teacher), reduction="sum")
    return differences / max(1, n * (n - 1) * (n - 2))


def _directions(x: Tensor) -> Tensor:
    """``x`` (..., D), each row of Euclidean length 1; those that are zero but for rounding get 0 and no gradient."""
    lengths = x.detach().norm(dim=-1, keepdim=True)
    known = lengths > NO_LENGTH * lengths.amax()
    directions: Tensor = F.normalize(torch.where(known, x, 0.0), dim=-1) * known
    return directions


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
