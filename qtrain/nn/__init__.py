"""Floor 2: layers with a weight and an input quantizer."""

from qtrain.nn.conv import QuantConv2d
from qtrain.nn.linear import QuantLinear

QuantLayer = QuantConv2d | QuantLinear
"""Any layer that conversion puts in place; for type hints. At run time test against :data:`QUANT_LAYERS`."""

QUANT_LAYERS = (QuantConv2d, QuantLinear)

__all__ = ["QUANT_LAYERS", "QuantConv2d", "QuantLayer", "QuantLinear"]
