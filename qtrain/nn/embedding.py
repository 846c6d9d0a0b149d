"""A table of quantized vectors."""

from typing import final

import torch.nn.functional as F
from torch import Tensor, nn

from qtrain.nn.base import quantized_weight, without_quantizers
from qtrain.quantizers.base import Quantizer


@final
class QuantEmbedding(nn.Embedding):
    """Rows of ``Q_w(W)`` in place of rows of ``W``; without a quantizer it is ``source``, bit for bit.

    Indices have nothing to quantize, so there is never an input quantizer. The whole table is quantized in each
    forward, which for the tables of vision models is cheap.
    """

    weight_quantizer: Quantizer | None
    input_quantizer: Quantizer | None
    tensor_quantizer: Quantizer | None
    gradient_quantizer: nn.Module | None
    held_weight: Tensor | None

    def __init__(self, *, source: nn.Embedding) -> None:
        nn.Module.__init__(self)
        for name in source.__constants__:
            setattr(self, name, getattr(source, name))
        self.weight = source.weight
        without_quantizers(self)
        self.training = source.training

    def effective_weight(self) -> Tensor:
        """The table before quantization: (num_embeddings, embedding_dim)."""
        return self.weight

    def forward(self, input: Tensor) -> Tensor:
        output = F.embedding(input, quantized_weight(self), self.padding_idx)
        return output if self.gradient_quantizer is None else self.gradient_quantizer(output)
