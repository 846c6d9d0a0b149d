"""The rise of the loss measured for pairs of choices too, for small networks."""

from collections.abc import Sequence
from functools import partial
from itertools import combinations
from typing import final

from qtrain.convert.bank import QuantizerBank
from qtrain.sensitivity.base import Done, Score, label_of, part_of, scores_of
from qtrain.sensitivity.one_layer import Measure, checked_measure, measuring
from qtrain.spec import Batch, Choice, Scores


@final
class Clado(Score):
    """The rise of each choice, and what two of them add together: ``L(i, j) - L(i) - L(j) + L(0)``.

    The latter is ``d_i^T H d_j`` to second order, the part of the loss that scores of single layers leave out (CLADO,
    Deng et al. 2023, arXiv 2307.05657, §4). It takes a forward of all images for each pair, so networks with more than
    ``pairs`` pairs are refused. ``measure`` and ``chunk`` are those of :class:`qtrain.sensitivity.one_layer.OneLayer`.
    """

    def __init__(self, *, measure: Measure = "loss", pairs: int = 2000, chunk: int = 128) -> None:
        self.measure, self.pairs, self.chunk = checked_measure("Clado", measure), pairs, chunk

    def __call__(self, bank: QuantizerBank, batches: Sequence[Batch], *, seed: int, done: Done | None = None) -> Scores:
        choices = list(bank.choices())
        both = [(i, j) for i, j in combinations(choices, 2) if (i.layer, i.role) != (j.layer, j.role)]
        if len(both) > self.pairs:
            raise ValueError(
                f"Clado: {len(choices)} choices make {len(both)} pairs, each a forward of all images, and pairs allows "
                f"{self.pairs}; choose from fewer widths, raise pairs, or take score fisher"
            )
        with measuring(bank, batches, self.measure, self.chunk) as rise:

            def of(*chosen: Choice) -> float:
                name = " + ".join(label_of(choice) for choice in chosen)
                return part_of(done, name, partial(lambda c: [rise(c)], chosen))[0]

            alone = {choice: of(choice) for choice in choices}
            return scores_of(alone, {(i, j): of(i, j) - alone[i] - alone[j] for i, j in both})
