"""A look at a student before it is trained: what its target will compute in floating point, and why."""

from qtrain.convert.calibrate import calibrate
from qtrain.deployment.lint import Finding, lint, summary
from qtrain.pipeline.build_model import build_model, example_input
from qtrain.pipeline.conversion import convert, quiet_conversion, target_of
from qtrain.pipeline.load_data import load_data
from qtrain.pipeline.memory_format import settle_memory_format_
from qtrain.settings.run_settings import RunSettings
from qtrain.utils.errors import ConfigError


def lint_student(settings: RunSettings) -> tuple[list[Finding], str]:
    """What the target does not compute with integers of the student that ``settings`` describe, and that in one line.

    The network is calibrated on one batch and not trained; it may have any weights. Raises ``ConfigError`` without a
    target, and where nothing can be quantized.
    """
    target = target_of(settings)
    if target is None:
        raise ConfigError("target: task=lint asks what a runtime computes; give target=onnxruntime, for example")
    if not settings.quantize.enabled:
        raise ConfigError("quantize.enabled: is false, so that all layers stay in floating point")
    data = load_data(settings)
    model = build_model(settings.model, data.info)
    settle_memory_format_(settings, model, data)
    with quiet_conversion():  # the findings say it
        converted = convert(settings, model, example_input(data.info))
        calibrate(model, [batch.image for batch in data.calibration_batches(1)], converted.plans)
        found = lint(model, target, example_input(data.info), converted.skipped)
    return found, summary(found, model, target)
