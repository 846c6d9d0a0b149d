"""qtrain: distributed, distillation-assisted quantization-aware training."""

__version__ = "0.1.0"
