"""What a model costs: bytes, multiply-accumulates, bit operations."""

from qtrain.cost.count import CostReport, LayerCost, count

__all__ = ["CostReport", "LayerCost", "count"]
