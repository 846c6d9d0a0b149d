"""BRECQ: rounding learned block by block, together with the input quantizers."""

from dataclasses import dataclass
from typing import final

from qtrain.ptq.rounding.learn import BlockRounding


@final
@dataclass(frozen=True, kw_only=True)
class BRECQ(BlockRounding):
    """The weights of a block are rounded together, so that the block's output is that of full precision.

    Li et al. 2021, arXiv 2102.05426, §3.2: the layers of a residual block depend on each other, blocks hardly do.
    Rounding is learned as in :class:`~qtrain.ptq.rounding.adaround.AdaRound`. The parameters of input quantizers are
    learned at ``input_rate`` relative to their size (by LSQ's gradient). ``fisher`` weighs each output by its squared
    gradient (eq. 10).
    """

    fisher: bool = False
