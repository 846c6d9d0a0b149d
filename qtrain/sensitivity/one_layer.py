"""The rise of the loss measured with one weight or one input quantized at a time."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, final

import torch
from torch import Tensor

from qtrain.convert.bank import QuantizerBank
from qtrain.functional.losses import hard_loss, soft_target_loss
from qtrain.sensitivity.base import Done, Score, chunks, label_of, part_of, scores_of, scoring
from qtrain.spec import Batch, Choice, Scores

Measure = Literal["kl", "loss"]


@final
class OneLayer(Score):
    """What each choice alone does to the output: mean over the images, in nats.

    ``measure="kl"`` is ``KL(p || p_choice)`` between the softmax outputs in full precision and with the choice, as in
    ZeroQ (Cai et al. 2020, arXiv 2001.00281); it needs no labels and is never negative. ``measure="loss"`` is the
    cross-entropy with the choice less that in full precision; for many bits it is noise around 0. It takes one forward
    of all images for each choice, and one in full precision, of ``chunk`` images at a time.
    """

    def __init__(self, *, measure: Measure = "kl", chunk: int = 128) -> None:
        self.measure, self.chunk = checked_measure("OneLayer", measure), chunk

    def __call__(self, bank: QuantizerBank, batches: Sequence[Batch], *, seed: int, done: Done | None = None) -> Scores:
        with measuring(bank, batches, self.measure, self.chunk) as rise:
            return scores_of({c: part_of(done, label_of(c), lambda c=c: [rise([c])])[0] for c in bank.choices()})  # type: ignore[misc]


@contextmanager
def measuring(
    bank: QuantizerBank, batches: Sequence[Batch], measure: Measure, chunk: int
) -> Iterator[Callable[[Sequence[Choice]], float]]:
    """Inside, the function that it gives measures the mean rise with some choices, all else in full precision."""
    with scoring(bank) as model, torch.no_grad():
        parts = [batch for _, batch in chunks(batches, chunk)]
        exact = [model(part.image).double() for part in parts]

        def of_part(logits: Tensor, before: Tensor, target: Tensor) -> Tensor:
            if measure == "kl":
                return soft_target_loss(logits, before, 1.0)
            return hard_loss(logits, target) - hard_loss(before, target)

        def rise(choices: Sequence[Choice]) -> float:
            bank.put_(choices)
            rows = zip(parts, exact, strict=True)
            total = sum(len(p.image) * float(of_part(model(p.image).double(), b, p.target)) for p, b in rows)
            return total / sum(len(part.image) for part in parts)

        yield rise


def checked_measure(owner: str, measure: Measure) -> Measure:
    """``measure``, if there is such a one."""
    if measure not in ("kl", "loss"):
        raise ValueError(f"{owner}: measure must be kl or loss, got {measure!r}")
    return measure
