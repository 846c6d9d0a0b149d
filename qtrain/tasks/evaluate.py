"""The task that measures accuracy on the test images: of full-precision weights, or of a finished run's student."""

from pathlib import Path

from qtrain.config.compose import read_run
from qtrain.pipeline.evaluate import evaluate_student, evaluate_weights
from qtrain.pipeline.run_folder import Metrics
from qtrain.pipeline.student_file import student_at
from qtrain.settings.run_files import CONFIG
from qtrain.settings.run_settings import RunSettings

OF_THE_RUN = ("model", "data", "quantize", "experiment", "seed")
"""Sections of the config that are those of the run whose student is evaluated."""


def run(settings: RunSettings) -> Metrics:
    """Evaluate the weights of ``model.weights``, or the student of ``checkpoint``; accuracies are in percent.

    ``checkpoint=RUN_FOLDER``, or the ``student.safetensors`` in it, evaluates that run's student on the run's own test
    images; ``checkpoint=FILE``, a student's file anywhere else, on those of ``data``. The result is ``top1``. Otherwise
    the weights are evaluated in full precision, and the result is ``fp_top1``; task=calibrate quantizes them.
    """
    if settings.checkpoint is None:
        return evaluate_weights(settings)
    file = student_at(settings.checkpoint)
    return evaluate_student(of_its_run(settings, file), file)


def of_its_run(settings: RunSettings, file: Path) -> RunSettings:
    """``settings`` with the model and the images of the run that left the student in ``file``, if it lies in a run."""
    if not (file.parent / CONFIG).is_file():
        return settings
    return settings.with_sections(read_run(file.parent, settings).fits[-1], *OF_THE_RUN)
