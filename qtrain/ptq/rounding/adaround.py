"""AdaRound: rounding learned layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from torch import Tensor, nn

from qtrain.ptq.rounding.base import Rounding
from qtrain.ptq.rounding.learn import ReconstructionSettings, learn_rounding_
from qtrain.ptq.rounding.reconstruction_units import layers_of


@final
class AdaRound(Rounding):
    """Each layer's weights are rounded so that its output is that of full precision (Nagel 2020, arXiv 2004.10568).

    The input of the layer is that in the quantized model, with the layers before it rounded (the paper's asymmetric
    reconstruction) and input quantizers in use. Its target is the output in the full-precision model. There are
    ``iterations`` of Adam with minibatches of ``batch_size`` images. After the share ``warmup`` of them, the variables
    are driven to 0 and 1 with ``strength``, while beta falls from ``beta_start`` to ``beta_end`` (eq. 24). See
    :mod:`qtrain.ptq.rounding.learn`.
    """

    def __init__(
        self,
        *,
        iterations: int = 300,
        batch_size: int = 32,
        rate: float = 0.1,
        strength: float = 0.1,
        warmup: float = 0.2,
        beta_start: float = 20.0,
        beta_end: float = 2.0,
    ) -> None:
        self.settings = ReconstructionSettings(
            owner="AdaRound",
            iterations=iterations,
            batch_size=batch_size,
            rate=rate,
            strength=strength,
            warmup=warmup,
            beta_start=beta_start,
            beta_end=beta_end,
        )

    def __call__(self, student: nn.Module, images: Sequence[Tensor], *, seed: int) -> None:
        learn_rounding_(student, layers_of(student), images, settings=self.settings, seed=seed)
