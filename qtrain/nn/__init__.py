"""Layers with a weight and an input quantizer."""

from qtrain.nn.conv import QuantConv
from qtrain.nn.conv_transpose import QuantConvTranspose
from qtrain.nn.embedding import QuantEmbedding
from qtrain.nn.linear import QuantLinear
from qtrain.nn.operations import Operand

QuantWeighted = QuantConv | QuantConvTranspose | QuantEmbedding | QuantLinear
"""Any layer with a weight that conversion puts in place; for type hints and ``isinstance``."""

QuantLayer = QuantWeighted | Operand
"""Any place where conversion puts quantizers; for type hints and ``isinstance``."""

__all__ = ["Operand", "QuantConv", "QuantConvTranspose", "QuantEmbedding", "QuantLayer", "QuantLinear", "QuantWeighted"]
