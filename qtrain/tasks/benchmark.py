"""The task that measures how fast an exported student runs, beside full precision and the runtime's own 8 bits."""

from pathlib import Path

from qtrain.config.compose import read_run
from qtrain.pipeline.benchmark import benchmark
from qtrain.pipeline.student_file import student_at
from qtrain.settings.run_files import CONFIG
from qtrain.settings.run_settings import RunSettings
from qtrain.tasks.evaluate import OF_THE_RUN


def run(settings: RunSettings) -> dict[str, float]:
    """Measure the export of ``settings.checkpoint``; returns its time as a share of the others' for one image.

    Of a run, the full-precision weights are found as the run found them, and the runtime is calibrated on its images.
    """
    if settings.checkpoint is not None:
        file: Path = student_at(settings.checkpoint)
        if (file.parent / CONFIG).is_file():
            settings = settings.with_sections(read_run(file.parent, settings).fits[-1], *OF_THE_RUN, "full_precision")
    return benchmark(settings)
