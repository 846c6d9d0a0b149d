"""The rise of the loss measured with one weight or one input quantized at a time."""

from collections.abc import Sequence
from typing import Literal, final

import torch
from torch import Tensor

from qtrain.convert.bank import QuantizerBank
from qtrain.functional.losses import hard_loss, soft_target_loss
from qtrain.sensitivity.base import Done, Score, chunks, label_of, part_of, scores_of, scoring
from qtrain.spec import Batch, Scores


@final
class OneLayer(Score):
    """What each choice alone does to the output: mean over the images, in nats.

    ``measure="kl"`` is ``KL(p || p_choice)`` between the softmax outputs in full precision and with the choice, as in
    ZeroQ (Cai et al. 2020, arXiv 2001.00281); it needs no labels and is never negative. ``measure="loss"`` is the
    cross-entropy with the choice less that in full precision; for many bits it is noise around 0. It takes one forward
    of all images for each choice, and one in full precision, of ``chunk`` images at a time.
    """

    def __init__(self, *, measure: Literal["kl", "loss"] = "kl", chunk: int = 128) -> None:
        if measure not in ("kl", "loss"):
            raise ValueError(f"OneLayer: measure must be kl or loss, got {measure!r}")
        self.measure, self.chunk = measure, chunk

    @torch.no_grad()
    def __call__(self, bank: QuantizerBank, batches: Sequence[Batch], *, seed: int, done: Done | None = None) -> Scores:
        images = sum(len(batch.image) for batch in batches)
        with scoring(bank) as model:
            parts = [batch for _, batch in chunks(batches, self.chunk)]
            exact = [model(part.image) for part in parts]

            def rise(logits: Tensor, before: Tensor, target: Tensor) -> float:
                if self.measure == "kl":
                    return float(soft_target_loss(logits.double(), before.double(), 1.0))
                return float(hard_loss(logits.double(), target) - hard_loss(before.double(), target))

            def mean_rise() -> list[float]:
                rows = zip(parts, exact, strict=True)
                total = sum(len(p.image) * rise(model(p.image), before, p.target) for p, before in rows)
                return [total / images]

            values = {}
            for choice in bank.choices():
                bank.put_([choice])
                values[choice] = part_of(done, label_of(choice), mean_rise)[0]
        return scores_of(values)
