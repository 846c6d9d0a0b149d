"""QDrop: rounding learned block by block, while at each step some random activations are not quantized."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from torch import Tensor, nn

from qtrain.ptq.rounding.base import Rounding
from qtrain.ptq.rounding.learn import ReconstructionSettings, learn_rounding_
from qtrain.ptq.rounding.reconstruction_units import blocks_of


@final
class QDrop(Rounding):
    """As BRECQ, and each activation stays in full precision with probability ``drop`` (arXiv 2203.05740).

    Wei et al. 2022, §3.3 and algorithm 1: minima are flatter, since the weights are fitted to many mixtures of
    quantized and exact activations. There is a draw for each value, image and step. It chooses a block's input from the
    quantized or the full-precision model, and within the block it turns each input quantizer on or off. ``drop`` 0 is
    BRECQ; with 1 no input quantizer would learn. For the comparison with nearest rounding, and in use, nothing is
    dropped.
    """

    def __init__(
        self,
        *,
        drop: float = 0.5,
        blocks: Sequence[str] | None = None,
        iterations: int = 300,
        batch_size: int = 32,
        rate: float = 0.1,
        input_rate: float = 0.001,
        strength: float = 0.1,
        warmup: float = 0.2,
        beta_start: float = 20.0,
        beta_end: float = 2.0,
    ) -> None:
        self.blocks = tuple(blocks or ())
        self.settings = ReconstructionSettings(
            owner="QDrop",
            iterations=iterations,
            batch_size=batch_size,
            rate=rate,
            input_rate=input_rate,
            drop=drop,
            strength=strength,
            warmup=warmup,
            beta_start=beta_start,
            beta_end=beta_end,
        )

    def __call__(self, student: nn.Module, images: Sequence[Tensor], *, seed: int) -> None:
        learn_rounding_(student, blocks_of(student, self.blocks), images, settings=self.settings, seed=seed)
