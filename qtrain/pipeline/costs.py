"""What a run's student costs. Its products are counted once for all students of a process of many runs."""

from torch import nn

from qtrain.costs.count import CostReport, count
from qtrain.costs.geometry import layer_geometries
from qtrain.costs.products import count_products
from qtrain.costs.tables import further_cost
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


def further_costs(settings: RunSettings, student: nn.Module, data: VisionData, report: CostReport) -> dict[str, float]:
    """What ``student`` costs by those of ``allocate.costs`` that ``report``, of :func:`costs`, does not count.

    Latency, energy and the like, each in its own unit.
    """
    asked = {
        name: one for name, one in settings.allocate.costs.items() if one is not None and not hasattr(report, name)
    }
    if not asked:
        return {}
    student = in_use(student)
    geometries = layer_geometries(student, example_input(data.info))
    return {name: further_cost(one.build(), student, report, geometries).total for name, one in asked.items()}
