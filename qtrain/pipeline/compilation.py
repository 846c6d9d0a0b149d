"""Whether the training step is compiled: as ``fit.compile`` says, or, where it is ``auto``, if that saves time.

The evaluation after each epoch follows the same arithmetic, with ``fit.compile=true`` too.

The answer follows from the configuration and from nothing that is measured in the run: a compiled step rounds the last
bit otherwise than an eager one, so the same command must come to the same answer, also when it goes on with a run.
"""

import logging
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from qtrain.data.base import VisionData
from qtrain.nn import QuantLayer
from qtrain.nn.many_bits import ManyBits
from qtrain.pipeline.build_model import example_input
from qtrain.settings.run_settings import RunSettings
from qtrain.utils.calls import see_input
from qtrain.utils.eval_mode import evaluating

log = logging.getLogger(__name__)

AUTO = "auto"
STEP, EVALUATION = "the step", "the evaluation after each epoch"

SAVED_S = (0.516612 - 0.343450) / (128 * 187_456)
"""Seconds that compiling saves for each number of an input that is rounded in training. From results/bench.csv: a step
of ResNet-20, W4A4, eager and compiled, with 128 images on two cores; its layers round 187,456 numbers of an image."""

COMPILE_S = (57.4547 - 7.91465) / 8
"""Processor seconds that compiling takes for each quantized layer. From results/bench.csv: one step of ResNet-8, which
has eight, compiled and eager, each a process of its own (``scripts/bench_startup.py --cases step compiled``)."""

SAVED_EVALUATION_S = (0.166123 - 0.101915) / (128 * 187_456)
"""The same of evaluation, from results/bench.csv too (``scripts/bench_phases.py --phases evaluation``)."""

COMPILE_EVALUATION_S = (34.8060 - 0.1019) / 22
"""Seconds that compiling an evaluation takes for each quantized layer. From the same row: the first evaluation of
ResNet-20, which has 22, with nothing kept on disk."""


def compiles(settings: RunSettings, student: nn.Module, data: VisionData) -> bool:
    """Whether the step of ``student`` is compiled in this fit; ``auto`` logs its arithmetic."""
    asked = settings.fit.compile
    if asked != AUTO:
        return bool(asked)
    if why := _why_not(settings, student):
        return _said(STEP, False, why)
    epoch = min(data.info.train_size, len(data.train_dataloader()) * data.batch_size)
    images = round(settings.fit.epochs * settings.fit.share * epoch)
    return _said(STEP, *_repays(student, data, images, saved_s=SAVED_S, compile_s=COMPILE_S))


def compiles_evaluation(settings: RunSettings, student: nn.Module, data: VisionData) -> bool:
    """Whether the evaluation after each epoch of this fit is compiled: where its step may be, if it is repaid."""
    every = int(settings.trainer.get("check_val_every_n_epoch", 1))
    images = int(settings.fit.epochs * settings.fit.share) // every * data.info.val_size
    if not images or settings.fit.compile is False or _why_not(settings, student) or isinstance(student, ManyBits):
        return False
    answer = _repays(student, data, images, saved_s=SAVED_EVALUATION_S, compile_s=COMPILE_EVALUATION_S)
    return _said(EVALUATION, *answer, asked=str(settings.fit.compile).lower())


def _why_not(settings: RunSettings, student: nn.Module) -> str:
    """Why nothing is compiled unasked, whatever it would save; empty where that is to be worked out."""
    if not _quantized_layers(student):
        return "nothing is quantized, and a step in full precision gains nothing"
    if settings.fit.shard:
        return "a student that is spread over processes is not compiled"
    if torch.cuda.is_available() and settings.trainer.get("accelerator") != "cpu":
        return "what compiling saves was measured on processors alone; fit.compile=true compiles"
    return ""


def _repays(student: nn.Module, data: VisionData, images: int, *, saved_s: float, compile_s: float) -> tuple[bool, str]:
    """Whether compiling saves more time over ``images`` images than it takes, and the arithmetic."""
    layers, rounded = _quantized_layers(student), _rounded(student, example_input(data.info))
    saved, spent = images * rounded * saved_s, layers * compile_s
    return saved > spent, (
        f"{images:,} images, of which each has {rounded:,} numbers rounded, take about {saved:.0f} s less, and "
        f"compiling {layers} layers takes about {spent:.0f} s"
    )


def _said(what: str, answer: bool, why: str, asked: str = AUTO) -> bool:
    log.info("fit.compile=%s: %s is %s: %s", asked, what, "compiled" if answer else "not compiled", why)
    return answer


def _quantized_layers(student: nn.Module) -> int:
    return sum(isinstance(module, QuantLayer) for module in student.modules())


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
