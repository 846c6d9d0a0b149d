"""Whether the training step is compiled: as ``fit.compile`` says, or, where it is ``auto``, if that saves time.

The answer follows from the configuration and from nothing that is measured in the run: a compiled step rounds the last
bit otherwise than an eager one, so the same command must come to the same answer, also when it goes on with a run.
"""

import logging
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from qtrain.data.base import VisionData
from qtrain.nn import QuantLayer
from qtrain.pipeline.build_model import example_input
from qtrain.settings.run_settings import RunSettings
from qtrain.utils.calls import see_input
from qtrain.utils.eval_mode import evaluating

log = logging.getLogger(__name__)

AUTO = "auto"

SAVED_S = (0.516612 - 0.343450) / (128 * 187_456)
"""Seconds that compiling saves for each number of an input that is rounded in training. From results/bench.csv: a step
of ResNet-20, W4A4, eager and compiled, with 128 images on two cores; its layers round 187,456 numbers of an image."""

COMPILE_S = (57.4547 - 7.91465) / 8
"""Processor seconds that compiling takes for each quantized layer. From results/bench.csv: one step of ResNet-8, which
has eight, compiled and eager, each a process of its own (``scripts/bench_startup.py --cases step compiled``)."""


def compiles(settings: RunSettings, student: nn.Module, data: VisionData) -> bool:
    """Whether the step of ``student`` is compiled in this fit; ``auto`` logs its arithmetic."""
    asked = settings.fit.compile
    if asked != AUTO:
        return bool(asked)
    layers = sum(isinstance(module, QuantLayer) for module in student.modules())
    if not layers:
        return _said(False, "nothing is quantized, and a step in full precision gains nothing")
    if settings.fit.shard:
        return _said(False, "a student that is spread over processes is not compiled")
    if torch.cuda.is_available() and settings.trainer.get("accelerator") != "cpu":
        return _said(False, "what compiling saves was measured on processors alone; fit.compile=true compiles")
    epoch = min(data.info.train_size, len(data.train_dataloader()) * data.batch_size)
    images = round(settings.fit.epochs * settings.fit.share * epoch)
    rounded = _rounded(student, example_input(data.info))
    saved, spent = images * rounded * SAVED_S, layers * COMPILE_S
    arithmetic = (
        f"{images:,} images, of which each has {rounded:,} numbers rounded, take about {saved:.0f} s less, and "
        f"compiling {layers} layers takes about {spent:.0f} s"
    )
    return _said(saved > spent, arithmetic)


def _said(answer: bool, why: str) -> bool:
    log.info("fit.compile=auto: the step is %s: %s", "compiled" if answer else "not compiled", why)
    return answer


@torch.no_grad()
def _rounded(student: nn.Module, image: Tensor) -> int:
    """How many numbers the quantizers of inputs round in a forward of one ``image`` (1, C, H, W)."""
    found: list[int] = []
    with ExitStack() as hooks, evaluating(student):
        for module in student.modules():
            if isinstance(module, QuantLayer) and module.input_quantizer is not None:
                hooks.callback(see_input(module.input_quantizer, lambda x: found.append(x.numel())).remove)
        student(image.to(next(student.parameters()).device))
    return sum(found)
