"""BRECQ: rounding learned block by block, together with the input quantizers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from torch import Tensor, nn

from qtrain.ptq.rounding.base import Rounding
from qtrain.ptq.rounding.learn import ReconstructionSettings, learn_rounding_
from qtrain.ptq.rounding.reconstruction_units import blocks_of


@final
class BRECQ(Rounding):
    """The weights of a block are rounded together, so that the block's output is that of full precision.

    Li et al. 2021, arXiv 2102.05426, §3.2: the layers of a residual block depend on each other, blocks hardly do.
    Rounding is learned as in :class:`~qtrain.ptq.rounding.adaround.AdaRound`. The parameters of input quantizers, LSQ's
    step for instance, are learned with it, at ``input_rate`` relative to their size (§3.4, by LSQ's gradient).
    ``blocks`` are patterns of module names; without any, they are found by
    :func:`~qtrain.ptq.rounding.reconstruction_units.blocks_of`. ``fisher`` weighs each output by its squared gradient
    (eq. 10).
    """

    def __init__(
        self,
        *,
        blocks: Sequence[str] | None = None,
        iterations: int = 300,
        batch_size: int = 32,
        rate: float = 0.1,
        input_rate: float = 0.001,
        fisher: bool = False,
        strength: float = 0.1,
        warmup: float = 0.2,
        beta_start: float = 20.0,
        beta_end: float = 2.0,
    ) -> None:
        self.blocks = tuple(blocks or ())
        self.settings = ReconstructionSettings(
            owner="BRECQ",
            iterations=iterations,
            batch_size=batch_size,
            rate=rate,
            input_rate=input_rate,
            fisher=fisher,
            strength=strength,
            warmup=warmup,
            beta_start=beta_start,
            beta_end=beta_end,
        )

    def __call__(self, student: nn.Module, images: Sequence[Tensor], *, seed: int) -> None:
        learn_rounding_(student, blocks_of(student, self.blocks), images, settings=self.settings, seed=seed)
