"""What a model costs: bytes, multiply-accumulates, bit operations, energy, area."""

from qtrain.costs.count import CostReport, LayerCost, count

__all__ = ["CostReport", "LayerCost", "count"]
