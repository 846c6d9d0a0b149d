"""QDrop: rounding learned block by block, while at each step some random activations are not quantized."""

from dataclasses import dataclass
from typing import final

from qtrain.ptq.rounding.learn import BlockRounding


@final
@dataclass(frozen=True, kw_only=True)
class QDrop(BlockRounding):
    """As BRECQ, and each activation stays in full precision with probability ``drop`` (arXiv 2203.05740).

    Wei et al. 2022, §3.3 and algorithm 1: minima are flatter, since the weights are fitted to many mixtures of
    quantized and exact activations. There is a draw for each value, image and step. It chooses a block's input from the
    quantized or the full-precision model, and within the block it turns each input quantizer on or off. ``drop`` 0 is
    BRECQ; with 1 no input quantizer would learn. For the comparison with nearest rounding, and in use, nothing is
    dropped.
    """

    drop: float = 0.5
