"""The largest eigenvalue of the Hessian times the rounding error, as in HAWQ."""

from collections.abc import Sequence
from functools import partial
from typing import final

import torch
from torch import Tensor

from qtrain.convert.bank import ROLES, QuantizerBank
from qtrain.functional.random import seed_of
from qtrain.sensitivity.base import Done, Score, check_labels, chunks, part_of, scores_of, scoring
from qtrain.sensitivity.hessian import Curvature, noise_power, random_signs
from qtrain.spec import Batch, Choice, Role, Scores


@final
class HawqEigenvalue(Score):
    """``1/2 l |Q(t) - t|^2`` for each weight and each input ``t``, in nats, with the largest eigenvalue ``l`` of its
    block of the Hessian: the most that an error of this size can raise the loss by, to second order.

    HAWQ orders blocks by ``l`` over their number of weights (Dong et al. 2019, arXiv 1905.03696, eq. 7) and quantizes
    in the order of ``l |Q(W) - W|^2`` (eq. 8); this is the latter for each layer. The eigenvalue that is largest in
    magnitude comes from power iteration, with products ``H v`` of one layer at a time; of an input, it is that of each
    image, and their mean counts. It stops where no eigenvalue of a layer changes by more than ``tolerance``, or after
    ``iterations``. An eigenvalue below 0 counts 0. A product for each layer is what makes it slow, so the first
    ``images`` serve, all of them at a time.
    """

    def __init__(self, *, iterations: int = 30, tolerance: float = 0.01, images: int = 32) -> None:
        if iterations < 1 or images < 1 or not tolerance > 0:
            raise ValueError(
                "HawqEigenvalue: iterations and images must be 1 or more and tolerance above 0, "
                f"got {iterations}, {images} and {tolerance}"
            )
        self.iterations, self.tolerance, self.images = iterations, tolerance, images

    def __call__(self, bank: QuantizerBank, batches: Sequence[Batch], *, seed: int, done: Done | None = None) -> Scores:
        check_labels(batches)
        batch = _first(batches, self.images)
        values: dict[Choice, float] = {}
        with scoring(bank):
            power = noise_power(bank, [batch], len(batch.image))
            for role in ROLES:
                names = list(dict.fromkeys(choice.layer for choice in bank.choices(role)))
                if not names:
                    continue
                curvature = part_of(done, role, partial(self._curvatures, bank, batch, role, names, seed))
                known = dict(zip(names, curvature, strict=True))
                values |= {c: 0.5 * max(known[c.layer], 0.0) * power[c] for c in bank.choices(role)}
        return scores_of(values)

    def eigenvalues(
        self, bank: QuantizerBank, batches: Sequence[Batch], role: Role, *, seed: int
    ) -> dict[str, list[tuple[float, int]]]:
        """For each layer of ``role``, the largest eigenvalue by each of its calls, and the elements of its vector."""
        batch = _first(batches, self.images)
        with scoring(bank):
            return self._eigenvalues(bank, batch, role, seed)

    def _curvatures(self, bank: QuantizerBank, batch: Batch, role: Role, names: list[str], seed: int) -> list[float]:
        """Eigenvalue times elements, which is what a mean squared error is multiplied by; of each of ``names``."""
        found = self._eigenvalues(bank, batch, role, seed)
        return [sum(value * size for value, size in found[name]) for name in names]

    def _eigenvalues(
        self, bank: QuantizerBank, batch: Batch, role: Role, seed: int
    ) -> dict[str, list[tuple[float, int]]]:
        curvature = Curvature(bank, role, batch)
        found: dict[str, list[tuple[float, int]]] = {}
        for place, variable in enumerate(curvature.variables):
            count = len(batch.image)
            blocks = count if role == "input" and variable.value.shape[0] % count == 0 else 1
            v = random_signs(seed_of(seed, ROLES.index(role), place), variable.value).reshape(blocks, -1)
            value = torch.zeros(blocks, 1, dtype=v.dtype, device=v.device)
            vectors: list[Tensor] = [variable.value] * len(curvature.variables)
            for _ in range(self.iterations):
                v = v / v.norm(dim=1, keepdim=True).clamp(min=torch.finfo(v.dtype).tiny)
                vectors[place] = v.reshape(variable.value.shape)
                product = curvature.products(vectors, only=place)[0].reshape(blocks, -1) * blocks  # of one image's loss
                before, value = value, (v * product).sum(dim=1, keepdim=True)
                v = product
                if bool(((value - before).abs() <= self.tolerance * value.abs()).all()):
                    break
            found.setdefault(variable.layer, []).append((float(value.mean()), variable.value.numel() // blocks))
        return found


def _first(batches: Sequence[Batch], count: int) -> Batch:
    """The first ``count`` images of ``batches``, or all where there are fewer."""
    parts = [part for _, part in chunks(batches, count)]
    taken, left = [], count
    for part in parts:
        taken.append(Batch(*(tensor[:left] for tensor in part)))
        left -= len(taken[-1].image)
        if left <= 0:
            break
    return Batch(*(torch.cat(tensors) for tensors in zip(*taken, strict=True)))
