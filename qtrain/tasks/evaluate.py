"""The task that measures accuracy on the test images: of full-precision weights, or of a finished run's student."""

from __future__ import annotations

from pathlib import Path

from qtrain.config.compose import read_run
from qtrain.pipeline.evaluate import evaluate_student, evaluate_weights
from qtrain.pipeline.run_folder import Metrics
from qtrain.settings.run_files import CONFIG, STUDENT
from qtrain.settings.run_settings import RunSettings
from qtrain.utils.errors import ConfigError

OF_THE_RUN = ("model", "data", "quantize", "experiment", "seed")
"""Sections of the config that are those of the run whose student is evaluated."""


def run(settings: RunSettings) -> Metrics:
    """Evaluate the weights of ``model.weights``, or the student of ``checkpoint``; accuracies are in percent.

    ``checkpoint=RUN_FOLDER``, or the ``student.safetensors`` in it, evaluates that run's student as it was trained;
    model, quantizers and data are then those of the run, and the result is ``top1``. Otherwise the weights are
    evaluated in full precision, and the result is ``fp_top1``; task=calibrate quantizes them.
    """
    if settings.checkpoint is None:
        return evaluate_weights(settings)
    folder = _run_folder(settings.checkpoint)
    trained = read_run(folder, settings).fits[-1]
    return evaluate_student(settings.with_sections(trained, *OF_THE_RUN), folder)


def _run_folder(checkpoint: str) -> Path:
    path = Path(checkpoint)
    folder = path.parent if path.is_file() else path
    for name in (CONFIG, STUDENT):
        if not (folder / name).is_file():
            raise ConfigError(
                f"checkpoint: {checkpoint} is no finished run: {folder / name} is not there; give the folder of a run, "
                "for instance outputs/quickstart/w4a4-distill"
            )
    return folder
