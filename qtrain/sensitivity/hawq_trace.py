"""The mean trace of the Hessian times the rounding error, as in HAWQ-V2."""

import logging
import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, final

import torch
from scipy.stats import t as student_t
from torch import Tensor

from qtrain.convert.bank import ROLES, QuantizerBank
from qtrain.functional.random import seed_of
from qtrain.sensitivity.base import Done, Score, check_labels, chunks, part_of, scores_of, scoring
from qtrain.sensitivity.hessian import Curvature, noise_power, random_signs
from qtrain.spec import Batch, Role, Scores

log = logging.getLogger(__name__)

ROUND = 4
"""Probes between two looks at the intervals."""
NEGLIGIBLE = 0.01
"""A trace below this share of the largest one is known well enough where its interval is small beside that share."""


class Trace(NamedTuple):
    """The trace of one block of the Hessian, the half width of its interval, and the probes that it comes from."""

    mean: float
    half_width: float
    probes: int


@final
class HawqTrace(Score):
    """``1/2 tr(H) mean((Q(t) - t)^2)`` for each weight and each input ``t``, in nats.

    That is HAWQ-V2's mean trace times the squared error (Dong et al. 2020, arXiv 1911.03852, eq. 7), which is what the
    loss rises by if errors have no direction of their own. A trace below 0, which rounding cannot profit from, counts
    0. The trace is Hutchinson's: the mean of ``z^T H z`` over random signs ``z``, for all layers of a role with one
    product ``H z``. Each probe sees all images, ``chunk`` at a time.

    Probes stop when every trace is known: with ``confidence``, it lies within ``tolerance`` of the mean (Student's t
    over the probes). They also stop after ``probes`` of them, and the widest interval is logged.
    """

    def __init__(self, *, probes: int = 64, tolerance: float = 0.1, confidence: float = 0.95, chunk: int = 32) -> None:
        if probes < 2:
            raise ValueError(f"HawqTrace: probes must be 2 or more for an interval, got {probes}")
        if not 0 < confidence < 1 or not tolerance > 0:
            raise ValueError(
                f"HawqTrace: confidence must be in (0, 1) and tolerance above 0, got {confidence} and {tolerance}"
            )
        self.probes, self.tolerance, self.confidence, self.chunk = probes, tolerance, confidence, chunk

    def __call__(self, bank: QuantizerBank, batches: Sequence[Batch], *, seed: int, done: Done | None = None) -> Scores:
        check_labels(batches)
        known = {role: self.traces(bank, batches, role, seed=seed, done=done) for role in ROLES}
        with scoring(bank):
            power = noise_power(bank, batches, self.chunk)
        return scores_of({c: 0.5 * max(known[c.role][c.layer].mean, 0.0) * power[c] for c in bank.choices()})

    def traces(
        self, bank: QuantizerBank, batches: Sequence[Batch], role: Role, *, seed: int, done: Done | None = None
    ) -> dict[str, Trace]:
        """The trace of the Hessian of the mean loss by each weight, or each image's by each input: layer -> trace."""
        names = list(dict.fromkeys(choice.layer for choice in bank.choices(role)))
        images = sum(len(batch.image) for batch in batches)
        samples: list[Tensor] = []
        if not names:
            return {}
        with scoring(bank):
            while len(samples) < self.probes:
                first, count = len(samples), min(ROUND, self.probes - len(samples))
                total = torch.zeros(count, len(names), dtype=torch.float64)
                for number, (part, batch) in enumerate(chunks(batches, self.chunk)):
                    probe = partial(_probed, bank, role, names, batch, first, count, seed, number)
                    rows = part_of(done, f"{role} {first}+{count} {part}", probe)
                    total += torch.tensor(rows, dtype=torch.float64).reshape(count, -1) * (len(batch.image) / images)
                samples += total.unbind()
                found = self._intervals(torch.stack(samples))
                if len(samples) >= 2 * ROUND and self._widest(found) <= self.tolerance:
                    break
        log.info("trace by %s: %d probes, widest interval +-%.0f %%", role, len(samples), 100 * self._widest(found))
        return dict(zip(names, found, strict=True))

    def _intervals(self, samples: Tensor) -> list[Trace]:
        """From ``samples`` (P, L)."""
        count = len(samples)
        if count < 2:
            return [Trace(mean, math.inf, count) for mean in samples[0].tolist()]
        quantile = float(student_t.ppf(0.5 + self.confidence / 2, count - 1))
        half = (samples.std(dim=0) * quantile / count**0.5).tolist()
        return [Trace(mean, width, count) for mean, width in zip(samples.mean(dim=0).tolist(), half, strict=True)]

    def _widest(self, found: Sequence[Trace]) -> float:
        """The largest half width, relative to its trace."""
        least = NEGLIGIBLE * max((abs(trace.mean) for trace in found), default=0.0)
        return max((trace.half_width / max(abs(trace.mean), least, 1e-300) for trace in found), default=0.0)


def _probed(
    bank: QuantizerBank, role: Role, names: list[str], batch: Batch, first: int, count: int, seed: int, number: int
) -> list[float]:
    """``z^T H z`` of the mean loss of ``batch``, for each of ``count`` probes and each of ``names``."""
    curvature = Curvature(bank, role, batch)
    rows: list[float] = []
    for probe in range(first, first + count):
        z = [
            random_signs(seed_of(seed, ROLES.index(role), probe, number, place), variable.value)
            for place, variable in enumerate(curvature.variables)
        ]
        row = dict.fromkeys(names, 0.0)
        for variable, sign, product in zip(curvature.variables, z, curvature.products(z), strict=True):
            row[variable.layer] += float((sign * product).sum(dtype=torch.float64))
        rows += row.values()
    return rows
