"""What takes time beside training steps, in passes: evaluation, calibration, scores, learned rounding, synthesis.

    python scripts/bench_phases.py                                       # ResNet-20, W4A4, 128 images
    python scripts/bench_phases.py --threads 2 --results results/bench.csv
    python scripts/bench_phases.py quantize.bits.weight=2 --phases Fisher BRECQ

A pass is one forward of full precision over the same images, without gradients. What repeats a step is measured over
few of them, as its name says. Eager unless its name says otherwise; weights and images are random, since time does not
depend on them. How it is measured: ``bench_harness.py``.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import bench_harness
import torch
from bench_harness import FULL, Measured, Work, columns, conditions, measure, table
from bench_step import CHANNELS, CLASSES, EXPERIMENT, build, quantized, student_bits, void
from torch import Tensor, nn

from qtrain.config.compose import compose
from qtrain.convert.bank import QuantizerBank
from qtrain.convert.calibrate import calibrate
from qtrain.pipeline.allocate import find_bits
from qtrain.pipeline.conversion import convert
from qtrain.pipeline.results import append_row, provenance
from qtrain.ptq.rounding.adaround import AdaRound
from qtrain.ptq.rounding.brecq import BRECQ
from qtrain.sensitivity.base import Score
from qtrain.sensitivity.fisher import Fisher
from qtrain.sensitivity.hawq_trace import HawqTrace
from qtrain.settings.run_settings import RunSettings
from qtrain.spec import Batch, DataInfo
from qtrain.synthesis.bn_statistics import BNStatistics
from qtrain.training.evaluation import evaluate
from qtrain.utils.compiled import Compiled

STEPS = 10
"""Steps of what repeats one."""
COMPILED = "evaluation of the student, compiled"
"""The one phase that is not eager."""
PROBES = 2
"""Products with the Hessian, for the weights and for the inputs."""


@dataclass(frozen=True)
class Phases:
    """What each phase works on; nothing is made before it is asked for."""

    overrides: Sequence[str]
    images: Tensor

    @cached_property
    def cfg(self) -> RunSettings:
        return compose(list(self.overrides))

    @property
    def size(self) -> int:
        return self.images.shape[-1]

    @cached_property
    def batch(self) -> Batch:
        generator = torch.Generator().manual_seed(0)
        labels = torch.randint(CLASSES, (len(self.images),), generator=generator)
        return Batch(self.images, labels, torch.arange(len(self.images)))

    @cached_property
    @torch.no_grad()
    def full(self) -> nn.Module:
        """With the statistics of the images in its batch norm, as if it were trained."""
        model = build(self.cfg.model, self.size).train()
        model(self.images)
        return model.eval()

    @cached_property
    def student(self) -> nn.Module:
        return quantized(self.cfg, self.size).eval()

    @cached_property
    def bank(self) -> QuantizerBank:
        """All widths of each layer, as a search has them."""
        searching = compose([*self.overrides, "allocate@quantize.bits=integer_program"])
        bank = find_bits(searching, copy.deepcopy(self.full), [self.batch], keep=False).problem.bank
        assert bank is not None
        return bank

    def scores(self, score: Score) -> Callable[[], None]:
        bank = self.bank
        return lambda: void(score(bank, [self.batch], seed=0))

    def evaluation(self, model: nn.Module) -> Callable[[], None]:
        return lambda: void(evaluate(model, [self.batch], torch.device("cpu")))

    def compiled_evaluation(self) -> Callable[[], None]:
        forward = Compiled(self.student)
        return torch.no_grad()(lambda: void(forward(self.images)))

    def calibration(self) -> None:
        model = copy.deepcopy(self.full)
        calibrate(model, [self.images], convert(self.cfg, model, self.images[:1]).plans)

    def rounding(self, rounding: AdaRound | BRECQ) -> Callable[[], None]:
        return lambda: rounding(copy.deepcopy(self.student), [self.images], seed=0)

    def synthesis(self) -> None:
        shades = (0.5,) * CHANNELS
        info = DataInfo(
            name="random", num_classes=CLASSES, in_channels=CHANNELS, image_size=self.size, mean=shades, std=shades,
            train_size=0, val_size=0, test_size=0, kind="resident",
        )  # fmt: skip
        making = BNStatistics(batch_size=len(self.images), steps=STEPS)
        with tempfile.TemporaryDirectory() as folder:
            device = torch.device("cpu")
            making.learn([self.full], info, seed=0, folder=Path(folder), device=device)
            making.make([self.full], info, number=0, seed=0, device=device)

    def works(self) -> dict[str, Callable[[], Callable[[], None]]]:
        """Phase -> what gives its work; what that needs is made then."""
        adaround, brecq = AdaRound(iterations=STEPS), BRECQ(iterations=STEPS)
        return {
            FULL: lambda: self.evaluation(self.full),
            "evaluation of the student": lambda: self.evaluation(self.student),
            COMPILED: self.compiled_evaluation,
            "conversion and calibration": lambda: self.calibration,
            "Fisher scores": lambda: self.scores(Fisher()),
            f"traces, {PROBES} probes": lambda: self.scores(HawqTrace(probes=PROBES)),
            f"AdaRound, {STEPS} steps": lambda: self.rounding(adaround),
            f"BRECQ, {STEPS} steps": lambda: self.rounding(brecq),
            f"synthesis, {STEPS} steps": lambda: self.synthesis,
        }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--phases", nargs="+", metavar="WORD", help="those whose name begins so; default: all")
    return bench_harness.parse(parser, arguments, over=EXPERIMENT, steps=1)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    fixed = [f"+experiment={EXPERIMENT}", "model.weights=null", "distill.teacher_weights=null"]
    images = torch.randn(
        options.batch, CHANNELS, options.size, options.size, generator=torch.Generator().manual_seed(0)
    )
    phases = Phases([*fixed, *options.overrides], images.to(memory_format=torch.channels_last))
    try:
        cfg = phases.cfg
    except ValueError as error:
        print(f"bench_phases: error: {error}", file=sys.stderr)
        return 2
    torch.manual_seed(cfg.seed)
    asked, works = tuple(options.phases or [""]), phases.works()
    if unknown := [word for word in asked if not any(name.startswith(word) for name in works)]:
        print(
            f"bench_phases: error: no phase begins with {unknown[0]!r}; there are {', '.join(works)}", file=sys.stderr
        )
        return 2
    works = {name: make for name, make in works.items() if name == FULL or name.startswith(asked)}
    cases = [
        (Measured(name, name == COMPILED, () if name == FULL else (FULL,), base_compiled=False), Work(make(), ()))
        for name, make in works.items()
    ]
    measure(cases, device=torch.device("cpu"), rounds=options.rounds, steps=options.steps, warmup=0)
    results = [measured for measured, _ in cases]
    notes = conditions(batch=options.batch, size=options.size, bf16=False, rounds=options.rounds, steps=options.steps)
    print(f"{cfg.model.name}: {notes}\n{table(results)}")
    if options.results:
        w_bits, a_bits = student_bits(cfg, options.size)
        known = provenance() | {
            "config_hash": cfg.identity, "experiment": cfg.experiment, "task": "bench_phases", "dataset": "random",
            "model": cfg.model.name, "quantizer": cfg.quantize.weight.kind.lower(), "w_bits": w_bits, "a_bits": a_bits,
            "notes": notes,
        }  # fmt: skip
        for one in results:
            append_row(options.results, {**known, **columns(one, results)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
