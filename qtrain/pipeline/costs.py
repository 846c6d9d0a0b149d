"""What a run's student costs. Its products are counted once for all students of a process of many runs."""

from torch import nn

from qtrain.costs.count import CostReport, count
from qtrain.costs.products import count_products
from qtrain.data.base import VisionData
from qtrain.nn.many_bits import in_use
from qtrain.pipeline.build_model import example_input
from qtrain.pipeline.load_data import depends_on, recipe_of
from qtrain.pipeline.run_cache import cached
from qtrain.settings.run_settings import RunSettings


def costs(settings: RunSettings, student: nn.Module, data: VisionData) -> CostReport:
    """Size and bit operations of ``student``, which is on the CPU and was converted by ``settings``.

    Of a student of many bits they are those of the width in use, as if it were alone.
    """
    example, student = example_input(data.info), in_use(student)
    layers = [name for name, _ in student.named_modules()]  # other bits may leave other modules
    what = {**depends_on(settings), "recipe": recipe_of(settings), "modules": layers}
    products = cached("products", what, lambda: count_products(student, example), lambda products: products)
    return count(student, example, products)
