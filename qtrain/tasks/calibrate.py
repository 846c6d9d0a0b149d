"""The task that makes a low-bit student without training it: post-training quantization."""

from pathlib import Path

from qtrain.pipeline.post_training import quantize_post_training
from qtrain.pipeline.run_folder import Metrics
from qtrain.report.calibration_advice import calibration_advice
from qtrain.report.table import print_summary
from qtrain.settings.run_settings import RunSettings


def run(settings: RunSettings) -> Metrics:
    """Make one student and print it beside the others of its experiment; returns accuracies in percent."""
    metrics = quantize_post_training(settings)
    print_summary(Path(settings.run_dir).parent)
    advice = calibration_advice(settings, full_precision=metrics["fp_top1"], calibrated=metrics["top1"])
    if advice is not None:
        print(advice)
    return metrics
