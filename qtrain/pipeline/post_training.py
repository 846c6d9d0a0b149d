"""Post-training quantization: a low-bit student without training it."""

import copy
import logging
import time
from pathlib import Path

import torch

from qtrain.data.image_grid import keep_picture
from qtrain.pipeline import prepare, run_folder
from qtrain.pipeline.build_model import build_model, has_weights
from qtrain.pipeline.costs import costs
from qtrain.pipeline.examples import keep_examples
from qtrain.pipeline.load_data import load_data
from qtrain.pipeline.many_bits import figures_by_width, settings_by_width
from qtrain.pipeline.run_folder import Metrics, run_in_folder
from qtrain.pipeline.student_file import write_student
from qtrain.pipeline.summary import CALIBRATED, FINISHED, FLOAT
from qtrain.pipeline.tested import Tested, on_test_images
from qtrain.settings.run_settings import RunSettings
from qtrain.utils.errors import ConfigError

log = logging.getLogger(__name__)


def quantize_post_training(settings: RunSettings) -> Metrics:
    """Convert, calibrate, correct and round as ``settings.quantize`` says; returns ``top1``, ``fp_top1`` in percent.

    A finished run of the same config is not repeated. Without a final test the metrics are ``None``. Raises
    ``ConfigError`` where there are no trained weights, nothing to quantize, or another run in the folder.
    """
    return run_in_folder(settings, lambda folder: _calibrate(settings, folder), names=("top1", "fp_top1"))


def _calibrate(settings: RunSettings, folder: Path) -> Metrics:
    if not settings.quantize.enabled:
        raise ConfigError("quantize.enabled: task=calibrate quantizes; task=evaluate measures full precision")
    if not has_weights(settings.model):
        raise ConfigError("model.weights: calibration needs a trained model; give a file, or model.pretrained=true")
    settings_by_width(settings)
    start = time.perf_counter()
    torch.manual_seed(settings.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = load_data(settings, test_only=not prepare.needs_images(settings))
    keep_picture(data, folder)
    full_precision = build_model(settings.model, data.info)
    prepared = prepare.prepare_student(settings, copy.deepcopy(full_precision).to(device), data)
    if settings.target is not None:
        prepare.settle_for_target_(prepared.student)
    seconds = time.perf_counter() - start
    log.info("calibrated in %.0f s", seconds)
    tested = Tested({"top1": None, "fp_top1": None}, {})
    if settings.fit.final_test:
        tested = on_test_images({"fp_top1": full_precision, "top1": prepared.student}, data, device)
        keep_examples(folder, data, {FLOAT: full_precision, CALIBRATED: prepared.student}, device)
    cost = costs(settings, prepared.student.cpu(), data)
    summary = run_folder.describe(settings, data.info, prepared.allocation, cost)
    summary |= tested.fields
    summary |= {
        "widths": figures_by_width(settings, prepared.student, data, tested),
        "name": folder.name,
        "distill": "none",
        "epochs": 0,
        "wall_s": seconds,
        "status": FINISHED if settings.fit.final_test else "not tested",
    }
    summary |= write_student(settings, folder, prepared.student, data.info, summary)
    run_folder.append_results(settings, folder, summary, device=device, notes="calibrated only")
    run_folder.finish(folder, summary)
    return tested.metrics
