"""The task that searches for bits: which layer gets how many, for a budget of size, operations, energy or time."""

from qtrain.pipeline.allocate_run import allocate_bits
from qtrain.report.allocation_page import write_allocation_page
from qtrain.report.allocation_table import allocation_table
from qtrain.settings.run_settings import RunSettings


def run(settings: RunSettings) -> dict[str, float]:
    """Search, print the bits of each layer and what they cost; returns the costs, the score and the measured loss."""
    made = allocate_bits(settings)
    print(allocation_table(made), end="")
    print(f"page: {write_allocation_page(made, title=f'{settings.model.name}: {settings.quantize.bits.kind}')}")
    print(f"the bits: {made.file}; use them with allocate@quantize.bits=from_file quantize.bits.path={made.file}")
    return {**made.found.predicted(made.found.allocation), "loss": made.losses["found"]}
