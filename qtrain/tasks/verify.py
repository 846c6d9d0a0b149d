"""The task that compares an exported folder with its student once more."""

from qtrain.pipeline.export_run import check_export, shipped
from qtrain.pipeline.student_file import student_at
from qtrain.settings.run_settings import RunSettings
from qtrain.tasks.evaluate import of_its_run
from qtrain.tasks.export import judged


def run(settings: RunSettings) -> dict[str, float]:
    """Compare the folder of ``settings.export`` with the student of ``settings.checkpoint``; as ``task=export``."""
    settings = settings if settings.checkpoint is None else of_its_run(settings, student_at(settings.checkpoint))
    what = shipped(settings)
    return judged(check_export(settings, what), what)
