"""The rise of the loss measured with one weight or one input changed at a time."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, final

import torch
from torch import Tensor

from qtrain.convert.bank import QuantizerBank
from qtrain.functional.losses import hard_loss, soft_target_loss
from qtrain.sensitivity.base import Done, Score, check_labels, chunks, label_of, part_of, scores_of, scoring
from qtrain.spec import FULL_PRECISION, Allocation, Batch, Choice, Role, Scores

Measure = Literal["kl", "loss"]

Reference = Callable[[Sequence[str]], Allocation]
"""Bits of the other layers, from the names of all: an allocator that does not search."""


@final
class OneLayer(Score):
    """What each choice alone does to the output: mean over the images, in nats.

    ``measure="kl"`` is ``KL(p || p_choice)`` between the softmax outputs in full precision and with the choice, as in
    ZeroQ (Cai et al. 2020, arXiv 2001.00281); it needs no labels and is never negative. ``measure="loss"`` is the
    cross-entropy with the choice less that in full precision; for many bits it is noise around 0. It takes one forward
    of all images for each choice, and one in full precision, of ``chunk`` images at a time.

    With few bits the errors of layers do not add up: what a layer loses at 2 bits depends on what the others have
    lost. ``reference`` gives the other layers bits, such as those of the uniform model, and the score is then
    ``D(reference with the choice) - D(reference with this tensor in full precision)``, where ``D`` is the measure. It
    may be below 0. Raises ``ValueError`` where the bank has no quantizer for bits of ``reference``.
    """

    def __init__(self, *, measure: Measure = "kl", chunk: int = 128, reference: Reference | None = None) -> None:
        self.measure, self.chunk, self.reference = checked_measure("OneLayer", measure), chunk, reference

    def __call__(self, bank: QuantizerBank, batches: Sequence[Batch], *, seed: int, done: Done | None = None) -> Scores:
        others = self._others(bank)
        with measuring(bank, batches, self.measure, self.chunk) as rise:

            def of(choice: Choice) -> float:
                if others.get(choice[:2]) == choice:  # the same model for all layers
                    return part_of(done, "reference", lambda: [rise([*others.values()])])[0]
                changed = [c for slot, c in others.items() if slot != choice[:2]]
                return part_of(done, label_of(choice), lambda: [rise([*changed, choice])])[0]

            without = dict.fromkeys(((c.layer, c.role) for c in bank.choices()), 0.0)
            if others:
                without = {slot: of(Choice(*slot, FULL_PRECISION)) for slot in without}
            return scores_of({c: of(c) - without[c.layer, c.role] for c in bank.choices()})

    def _others(self, bank: QuantizerBank) -> dict[tuple[str, Role], Choice]:
        """The choices of the reference, by layer and role; those in full precision are not listed."""
        if self.reference is None:
            return {}
        allocation, known, found = {**bank.fixed, **self.reference(bank.names)}, [*bank.choices()], {}
        for layer, role in dict.fromkeys((c.layer, c.role) for c in known):
            bits = bank.pinned.get((layer, role), getattr(allocation[layer], role))
            if bits != FULL_PRECISION:
                found[layer, role] = Choice(layer, role, bits)
        if missing := [choice for choice in found.values() if choice not in known]:
            layer, role, bits = missing[0]
            raise ValueError(
                f"OneLayer: reference has {bits} bits for the {role} of layer {layer!r}, which is none of the widths "
                f"here; add {bits} to allocate.{role}"
            )
        return found


@contextmanager
def measuring(
    bank: QuantizerBank, batches: Sequence[Batch], measure: Measure, chunk: int
) -> Iterator[Callable[[Sequence[Choice]], float]]:
    """Inside, the function that it gives measures the mean rise with some choices, all else in full precision."""
    if measure == "loss":
        check_labels(batches)
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
