"""QuantNoise: in training only a random part of the weight is quantized, so that the rest has exact gradients."""

from typing import final

import torch
from torch import Tensor

from qtrain.functional.indicator import above
from qtrain.functional.random import keyed_uniform
from qtrain.quantizers.base import MakeQuantizer
from qtrain.quantizers.hooks import Rate, checked_share, project, rate_at
from qtrain.quantizers.wrappers.wrapper import TrainingWrapper
from qtrain.spec import QuantSpec

LINEAR_BLOCK = 8


def block_mask(key: Tensor, rate: Tensor, shape: tuple[int, ...], block: int) -> Tensor:
    """Which elements of a weight (O, I, ...) are drawn: 1 at ``rate``, else 0; ``shape``, equal within a block.

    Blocks are ``block`` neighbors in the flattened row (I, ...) of an output channel; the last may be short.
    """
    outputs, row = shape[0], torch.Size(shape[1:]).numel()
    drawn = above(rate, keyed_uniform(key, (outputs, -(-row // block))))
    # Not repeat_interleave, which compiled code looks up element by element.
    return drawn.unsqueeze(2).expand(-1, -1, block).flatten(1).narrow(1, 0, row).reshape(shape)


@final
class QuantNoise(TrainingWrapper):
    """In training each block of the weight is ``Q(w)`` with probability ``rate``, otherwise ``w`` itself.

    Fan et al. 2020, arXiv 2004.07320, §4, around any quantizer ``Q``; in eval mode all is ``Q(w)``. What is left alone
    passes its exact gradient, what is quantized the one of ``Q``. ``rate`` is a number in [0, 1] or a schedule.
    ``block`` is the number of neighbors along the values that a product sums over (I kh kw) which share a draw; 0
    stands for the paper's choice: a kernel (kh kw), or 8 inputs where a kernel is a single value. Draws are a function
    of the step's key, so a resumed run repeats them.
    """

    serves = frozenset({"weight"})

    rate: Tensor
    key: Tensor

    def __init__(self, *, spec: QuantSpec, quantizer: MakeQuantizer, rate: Rate, block: int = 0) -> None:
        checked_share("QuantNoise", "rate", rate)
        if block < 0:
            raise ValueError(f"QuantNoise: block must be at least 1, or 0 for the kernel's size, got {block}")
        super().__init__(spec=spec, quantizer=quantizer)
        kernel = torch.Size(spec.shape[2:]).numel()
        self.block = block or (kernel if kernel > 1 else LINEAR_BLOCK)
        self.schedule = rate
        self.register_buffer("rate", torch.tensor(rate_at(rate, 0.0)))
        self.register_buffer("key", torch.zeros((), dtype=torch.int64), persistent=False)

    def begin_step_(self, *, progress: float, key: int) -> None:
        self.rate.fill_(rate_at(self.schedule, progress))
        self.key.fill_(key)

    def train_forward(self, x: Tensor) -> Tensor:
        drawn = block_mask(self.key, self.rate, tuple(x.shape), self.block).to(x.dtype)
        noisy: Tensor = self.inner(x) * drawn + x * (1 - drawn)
        return noisy

    def project(self, weight: Tensor) -> Tensor:
        return project(self.inner, weight)
