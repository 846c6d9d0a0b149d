"""The task that says, before training, what a target will not compute with integers."""

from collections import Counter

from qtrain.pipeline.lint import lint_student
from qtrain.settings.run_settings import RunSettings


def run(settings: RunSettings) -> dict[str, float]:
    """Print a line for each finding, and one about all; returns how many there are of each effect."""
    found, line = lint_student(settings)
    for one in found:
        print(one)
    print(line)
    return {effect: float(count) for effect, count in Counter(one.effect for one in found).items()}
