"""AdaRound: rounding learned layer by layer."""

from dataclasses import dataclass
from typing import final

from torch import nn

from qtrain.ptq.rounding.learn import LearnedRounding
from qtrain.ptq.rounding.reconstruction_units import layers_of


@final
@dataclass(frozen=True, kw_only=True)
class AdaRound(LearnedRounding):
    """Each layer's weights are rounded so that its output is that of full precision (Nagel 2020, arXiv 2004.10568).

    The input of the layer is that in the quantized model, with the layers before it rounded (the paper's asymmetric
    reconstruction) and input quantizers in use. Its target is the output in the full-precision model. See
    :mod:`qtrain.ptq.rounding.learn`, also for the options.
    """

    def parts(self, student: nn.Module) -> list[str]:
        return layers_of(student)
