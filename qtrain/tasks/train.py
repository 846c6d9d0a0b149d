"""The task that makes a low-bit student: load, convert, calibrate, distill, evaluate, record."""

from pathlib import Path

from pytorch_lightning.utilities import rank_zero_only

from qtrain.pipeline.run_folder import Metrics
from qtrain.pipeline.train import train
from qtrain.report.calibration_advice import calibration_advice
from qtrain.report.table import print_summary
from qtrain.settings.run_settings import RunSettings


def run(settings: RunSettings) -> Metrics:
    """Train one student and print it beside the others of its experiment; returns accuracies in percent."""
    metrics = train(settings)
    _conclude(settings, metrics)
    return metrics


@rank_zero_only
def _conclude(settings: RunSettings, metrics: Metrics) -> None:
    print_summary(Path(settings.run_dir).parent)
    final = settings.fits[-1]
    advice = calibration_advice(final, full_precision=metrics["fp_top1"], calibrated=metrics["ptq_top1"])
    if advice is not None:
        print(advice)
