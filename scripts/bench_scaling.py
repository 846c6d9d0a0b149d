"""How a step's cost grows with what it works on: images, parameters, quantizers and bits, one at a time.

    python scripts/bench_scaling.py                                      # ResNet-20, W4A4, LSQ
    python scripts/bench_scaling.py --axes images bits --threads 2 --results results/scaling.csv
    python scripts/bench_scaling.py quantizer@quantize.weight=apot       # any overrides of the experiment

Each point is a step of full precision and one of the student, eager, in turns. All else is as in ``bench_step.py``;
``plot_scaling.py`` draws the rows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import bench_harness
import torch
from bench_harness import FULL, Measured, Work, columns, conditions, measure, table
from bench_step import CHANNELS, CLASSES, EXPERIMENT, STUDENT, Setting, make_cases, quantized

from qtrain.config.compose import compose
from qtrain.convert.layers import quantizers_of
from qtrain.pipeline.results import append_row, provenance
from qtrain.settings.run_settings import RunSettings

IMAGES, PARAMETERS, QUANTIZERS, BITS = "images", "parameters", "quantizers", "bits"

POINTS: dict[str, dict[str, tuple[str, ...]]] = {
    IMAGES: {"16": (), "32": (), "64": (), "128": (), "256": ()},
    PARAMETERS: {f"width {w:g}": (f"model.width={w:g}",) for w in (0.5, 1.0, 2.0, 3.0)},
    QUANTIZERS: {f"{n} layers": (f"model=cifar_resnet{n}",) for n in (8, 20, 32, 44, 56)},
    BITS: {f"{b}": (f"quantize.bits.weight={b}", f"quantize.bits.input={b}") for b in (2, 3, 4, 6, 8)},
}
"""Axis -> its points by name, and what makes each."""


@dataclass(frozen=True)
class Point:
    """One point of an axis: ``at`` is its place there, in the axis' own unit."""

    axis: str
    name: str
    at: int
    cfg: RunSettings
    batch: int
    works: dict[str, Work]

    def case(self, case: str) -> str:
        return f"{case}, {self.axis} {self.name}"


def made(axis: str, name: str, overrides: Sequence[str], options: argparse.Namespace) -> Point:
    """The point ``name`` of ``axis``, ready to be measured."""
    batch = int(name) if axis == IMAGES else options.batch
    cfg = compose([*overrides, *POINTS[axis][name]])
    torch.manual_seed(cfg.seed)
    image = torch.randn(batch, CHANNELS, options.size, options.size).to(memory_format=torch.channels_last)
    setting = Setting(cfg, image, torch.randint(CLASSES, (batch,)), bf16=False, compiled=False)
    works = make_cases(setting)
    student = quantized(cfg, options.size)
    if axis == PARAMETERS:
        at = sum(p.numel() for p in student.parameters())
    elif axis == QUANTIZERS:
        at = len(quantizers_of(student))
    else:
        at = int(name)
    return Point(axis, name, at, cfg, batch, {case: works[case] for case in (FULL, STUDENT)})


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--axes", nargs="+", choices=list(POINTS), default=list(POINTS), help="(all)")
    return bench_harness.parse(parser, arguments, over=EXPERIMENT, steps=2, batch=64)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    fixed = [f"+experiment={EXPERIMENT}", "model.weights=null", "distill.teacher_weights=null", "teacher=none"]
    overrides = [*fixed, "objective=hard", *options.overrides]
    results: list[tuple[Point, Measured]] = []
    try:
        for axis in options.axes:
            points = [made(axis, name, overrides, options) for name in POINTS[axis]]
            cases = [
                (point, Measured(point.case(case), False, (point.case(FULL),) if case == STUDENT else ()), work)
                for point in points
                for case, work in point.works.items()
            ]
            measure(
                [(measured, work) for _, measured, work in cases],
                device=torch.device("cpu"), rounds=options.rounds, steps=options.steps, warmup=1,
            )  # fmt: skip
            results += [(point, measured) for point, measured, _ in cases]
    except ValueError as error:
        print(f"bench_scaling: error: {error}", file=sys.stderr)
        return 2
    of_all = [measured for _, measured in results]
    print(table(of_all))
    if options.results:
        process = provenance()
        for point, measured in results:
            notes = conditions(
                batch=point.batch, size=options.size, bf16=False, rounds=options.rounds, steps=options.steps
            )
            known = {"config_hash": point.cfg.identity, "experiment": point.cfg.experiment, "task": "bench_scaling"}
            found = {"dataset": "random", "model": point.cfg.model.name, "notes": notes, **columns(measured, of_all)}
            case = STUDENT if measured.bases else FULL
            place = {"axis": point.axis, "name": point.name, "at": point.at, "case": case}
            append_row(options.results, {**process, **known, **found, **place})
    return 0


if __name__ == "__main__":
    sys.exit(main())
