"""What a run's student costs. Its products are counted once for all students of a process of many runs."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf
from torch import nn

from qtrain.cost.count import CostReport, count, count_products
from qtrain.data.base import VisionData
from qtrain.pipeline.build_model import example_input
from qtrain.pipeline.load_data import depends_on
from qtrain.pipeline.run_cache import cached


def costs(cfg: DictConfig, student: nn.Module, data: VisionData) -> CostReport:
    """Size and bit operations of ``student``, which is on the CPU and was converted by ``cfg``."""
    example = example_input(data.info)
    recipe = OmegaConf.to_container(cfg.quantize, resolve=True)
    assert isinstance(recipe, dict)
    layers = [name for name, _ in student.named_modules()]  # other bits may leave other modules
    what = {**depends_on(cfg), "recipe": {k: v for k, v in recipe.items() if k != "bits"}, "modules": layers}
    products = cached("products", what, lambda: count_products(student, example), lambda products: products)
    return count(student, example, products)
