"""What one training step costs: full precision, the quantized student, the student with its teacher, live or cached.

    python scripts/bench_step.py                                       # ResNet-20, W4A4, batch 128, eager and compiled
    python scripts/bench_step.py --no-eager --threads 2 --results results/bench.csv
    python scripts/bench_step.py quantize.bits.weight=2 model=cifar_resnet56      # any overrides of the experiment
    python scripts/bench_step.py --size 64 --batch 32 model=timm model.name=resnet18 teacher=none objective=hard
    python scripts/bench_step.py --accumulate 4 --batch 16 --threads 2 teacher=none objective=hard
    python scripts/bench_step.py --variants cifar10/shootout --rounds 3 --steps 2 --no-compile   # each of its students

A step is what the training module does: forward, objective, backward, optimizer step, with the experiment's own
quantizers, teacher, optimizer and parameter groups; weights and images are random, since time does not depend on
them. How it is measured: ``bench_harness.py``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import bench_harness
import torch
from bench_harness import FULL, Measured, Work, columns, conditions, measure, table
from torch import Tensor, nn

from qtrain.config.compose import compose
from qtrain.convert.calibrate import calibrate
from qtrain.convert.layers import find_layers, quantizers_of
from qtrain.distillation.cached_teacher import CachedTeacher
from qtrain.distillation.hard import Hard
from qtrain.distillation.logit_format import Full
from qtrain.distillation.objective import Objective
from qtrain.functional import random
from qtrain.models.taps import feature_shapes
from qtrain.models.teacher import FrozenTeacher, Teacher
from qtrain.pipeline.conversion import convert
from qtrain.pipeline.results import append_row, provenance
from qtrain.pipeline.run_folder import typical_bits
from qtrain.run_task import selected
from qtrain.settings.component import Component
from qtrain.settings.run_settings import RunSettings
from qtrain.spec import Batch
from qtrain.training.computed_step import ComputedStep
from qtrain.training.fused import use_fused_
from qtrain.training.optim import parameter_groups
from qtrain.training.step import StudentStep

EXPERIMENT = "cifar10/resnet20_w4a4"
CLASSES, CHANNELS = 10, 3

SAMPLES = 50_000
"""Samples of the data set that a batch is taken from."""

STUDENT, TEACHER, DISTILLED = "student", "teacher forward", "student with teacher"
CACHED = "student with cached teacher"
EACH_BATCH = "student, weights quantized for each batch"
BASES = {STUDENT: (FULL,), DISTILLED: (STUDENT, TEACHER), CACHED: (STUDENT,), EACH_BATCH: (FULL,)}
"""Case -> the cases whose summed time is the 1 of its ratio."""
QUANTIZED = (STUDENT, DISTILLED, CACHED, EACH_BATCH)


@dataclass(frozen=True)
class Setting:
    """Where and with what a case runs: ``image`` (N, C, H, W) and ``target`` (N,) lie on the device."""

    cfg: RunSettings
    image: Tensor
    target: Tensor
    bf16: bool
    compiled: bool
    accumulated: int = 1
    """Batches whose gradients make one step."""

    @property
    def device(self) -> torch.device:
        return self.image.device

    @property
    def size(self) -> int:
        """Height and width of the images in pixels."""
        return self.image.shape[-1]

    @property
    def batch(self) -> Batch:
        """The step's batch; its samples' numbers are spread over the data set."""
        numbers = random.permutation(seed=0, epoch=0, n=SAMPLES)[: len(self.image)]
        return Batch(self.image, self.target, numbers.to(self.device))


def build(chosen: Component | None, size: int) -> nn.Module:
    """The network ``chosen`` for images of ``size`` pixels, with random weights."""
    assert chosen is not None
    model: nn.Module = chosen.build()(num_classes=CLASSES, in_channels=CHANNELS, image_size=size)
    return model.to(memory_format=torch.channels_last)


def quantized(cfg: RunSettings, size: int) -> nn.Module:
    """The experiment's student, calibrated on random images."""
    model = build(cfg.model, size)
    images = torch.randn(8, CHANNELS, size, size)
    calibrate(model, [images], convert(cfg, model, images[:1]).plans)
    return model


def student_bits(cfg: RunSettings, size: int) -> tuple[int, int]:
    """The weight and input bits that most of the student's layers have."""
    found = find_layers(build(cfg.model, size), torch.zeros(1, CHANNELS, size, size))
    return typical_bits(cfg.quantize.bits.build()(found.weighted))


def frozen_teacher(setting: Setting, names: Sequence[str]) -> FrozenTeacher:
    model = build(setting.cfg.teacher.model, setting.size)
    teacher = FrozenTeacher(model, names=names, bf16=setting.bf16, compile=setting.compiled)
    return teacher.to(setting.device, torch.channels_last)


def cached_teacher(setting: Setting, folder: str) -> CachedTeacher:
    """A teacher whose answers to the step's batch are kept already; what is kept in ``folder`` is read here and now."""
    teacher = CachedTeacher(
        frozen_teacher(setting, ()), data={"name": "random"}, keeps=Full(num_classes=CLASSES), folder=folder
    ).to(setting.device)
    batch = setting.batch
    for _ in ("written", "read"):
        teacher.begin(0, batch.index.cpu())
        teacher.answer(batch, 0)
        teacher.flush()
    return teacher


def training_step(
    setting: Setting, student: nn.Module, objective: Objective, teacher: Teacher | None, *, once: bool = True
) -> Work:
    """One step, as :class:`qtrain.training.module.QATModule` and Lightning make it.

    With ``once`` the batches of a step share the quantized weights.
    """
    module = StudentStep(student=student.train(), objective=objective).to(setting.device)
    if quantizers_of(student):
        step = ComputedStep(module, student, compile=setting.compiled)
    else:  # as torch compiles it by itself, which is faster for full precision
        compiled = torch.compile(module, fullgraph=True, dynamic=False) if setting.compiled else module
        step = ComputedStep(compiled, student)
    hold = once and setting.accumulated > 1
    groups = parameter_groups([student, objective], scale_lr=setting.cfg.fit.scale_lr)
    optimizer = setting.cfg.optimizer.build()(groups)
    use_fused_(optimizer)
    batch = setting.batch

    def run() -> None:
        for place in range(setting.accumulated):
            precision = torch.autocast(setting.device.type, dtype=torch.bfloat16) if setting.bf16 else nullcontext()
            with precision, step.hold(last=place + 1 == setting.accumulated) if hold else nullcontext():
                answer = () if teacher is None else teacher.answer(batch, 0)
                losses = step(batch.image, batch.target, *answer)
            if place == 0:
                optimizer.zero_grad()
            losses["total"].backward()
        optimizer.step()

    return Work(run, [*module.parameters(), *module.buffers(), batch.image, batch.target])


def make_cases(setting: Setting) -> dict[str, Work]:
    """Case -> what does it once. Each has a model, an objective and an optimizer of its own.

    Without a teacher there are two: full precision and the student. Where gradients of several batches make an eager
    step, there is one more, whose weights are quantized for each of them.
    """
    cfg, size = setting.cfg, setting.size
    labels = {name: Objective(terms={"hard": Hard()}) for name in (FULL, STUDENT)}
    cases = {
        FULL: training_step(setting, build(cfg.model, size), labels[FULL], None),
        STUDENT: training_step(setting, quantized(cfg, size), labels[STUDENT], None),
    }
    if setting.accumulated > 1 and not setting.compiled:
        cases[EACH_BATCH] = training_step(setting, quantized(cfg, size), labels[STUDENT], None, once=False)
    if cfg.teacher.model is None:
        return cases
    objective: Objective = cfg.objective.build()
    teacher = frozen_teacher(setting, objective.teacher_taps)
    student = quantized(cfg, size)
    example = (1, CHANNELS, size, size)
    objective.bind_(  # hints have regressors of their own
        feature_shapes(student, objective.student_taps, example),
        feature_shapes(teacher.model, objective.teacher_taps, example),
    )
    cases[TEACHER] = Work(lambda: void(teacher(setting.image)), ())
    cases[DISTILLED] = training_step(setting, student, objective, teacher)
    if not teacher.names:  # features are not cached
        with tempfile.TemporaryDirectory() as folder:
            cached = cached_teacher(setting, folder)
        cases[CACHED] = training_step(setting, quantized(cfg, size), cfg.objective.build(), cached)
    return cases


def variant_cases(setting: Setting, overrides: Sequence[str]) -> dict[str, Work]:
    """The step of each variant of ``setting.cfg``, by name, and that of full precision; not the repeats of seeds."""
    labels = Objective(terms={"hard": Hard()})
    cases = {FULL: training_step(setting, build(setting.cfg.model, setting.size), labels, None)}
    for name in selected(setting.cfg):
        cfg = compose([*overrides, *setting.cfg.variants[name], f"name={name}", "variants=null", "select=null"])
        if cfg.quantize.enabled and cfg.seed == setting.cfg.seed:
            cases[name] = training_step(replace(setting, cfg=cfg), quantized(cfg, setting.size), labels, None)
    return cases


def void(_: object) -> None:
    """Nothing, of whatever it is given."""


def bases_of(case: str) -> tuple[str, ...]:
    """The cases whose summed time is the 1 of ``case``'s ratio; a variant's is full precision."""
    return () if case in (FULL, TEACHER) else BASES.get(case, (FULL,))


def append_results(path: Path, results: Sequence[Measured], setting: Setting, notes: str, name: str | None) -> None:
    """A row for each case and mode, with the columns ``case``, ``mode`` and ``ratio`` after the common ones.

    The rows of students are called ``name``, or what their variant is called.
    """
    cfg, device = setting.cfg, setting.device
    bits, terms = student_bits(cfg, setting.size), "+".join(cfg.objective.build().teacher_terms)
    known = provenance(device) | {"config_hash": cfg.identity, "experiment": cfg.experiment, "task": "bench"}
    for one in results:
        variant = one.case if one.case in cfg.variants else None
        chosen = cfg.teacher.model if one.case == TEACHER and cfg.teacher.model is not None else cfg.model
        w_bits, a_bits = bits if one.case in QUANTIZED else (None, None) if variant else (32, 32)
        quantizer = cfg.quantize.weight.kind.lower()
        append_row(
            path,
            {
                **known,
                "dataset": "random",
                "model": chosen.name,
                "quantizer": quantizer if one.case in QUANTIZED else "",
                "w_bits": w_bits,
                "a_bits": a_bits,
                "distill": terms if one.case in (DISTILLED, CACHED) else "none",
                "notes": notes,
                "name": variant or (name if one.case in QUANTIZED else None),
                **columns(one, results),
                **({"case": STUDENT} if variant else {}),
            },
        )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--warmup", type=int, default=3, help="steps of each case before the first round (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--eager", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--accumulate", type=int, default=1, help="batches whose gradients make one step (%(default)s)")
    parser.add_argument("--name", help="what the students of the rows are called, if overrides make them others")
    parser.add_argument("--variants", metavar="EXPERIMENT", help="measure each variant of an experiment instead")
    options = bench_harness.parse(parser, arguments, over=EXPERIMENT)
    if options.accumulate < 1:
        parser.error(f"--accumulate must be at least 1, got {options.accumulate}")
    if not (options.eager or options.compile):
        parser.error("--no-eager and --no-compile together leave nothing to measure; drop one")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    device = torch.device(options.device)
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    try:
        experiment = options.variants or EXPERIMENT
        overrides = [
            f"+experiment={experiment}", "model.weights=null", "distill.teacher_weights=null", *options.overrides
        ]  # fmt: skip
        cfg = compose(overrides)
        if options.variants and not cfg.variants:
            raise ValueError(f"--variants: {experiment} names no variants; give an experiment that does")
        if not options.variants and (cfg.teacher.model is None) == cfg.objective.build().needs_teacher:
            raise ValueError("teacher and objective: one without the other; give both, or teacher=none objective=hard")
    except ValueError as error:
        print(f"bench_step: error: {error}", file=sys.stderr)
        return 2
    torch.manual_seed(cfg.seed)
    image = torch.randn(options.batch, CHANNELS, options.size, options.size).to(
        device, memory_format=torch.channels_last
    )
    target = torch.randint(CLASSES, (options.batch,)).to(device)
    cases: list[tuple[Measured, Work]] = []
    for compiled in [mode for mode, wanted in ((False, options.eager), (True, options.compile)) if wanted]:
        setting = Setting(cfg, image, target, bf16, compiled, options.accumulate)
        made = variant_cases(setting, overrides) if options.variants else make_cases(setting)
        cases += [(Measured(case, compiled, bases_of(case)), work) for case, work in made.items()]
    measure(cases, device=device, rounds=options.rounds, steps=options.steps, warmup=options.warmup)
    results = [measured for measured, _ in cases]
    notes = conditions(batch=options.batch, size=options.size, bf16=bf16, rounds=options.rounds, steps=options.steps)
    notes += f" accumulated={options.accumulate}" if options.accumulate > 1 else ""
    teacher = "" if options.variants or cfg.teacher.model is None else f", teacher {cfg.teacher.model.name}"
    print(f"{cfg.model.name}{teacher}, {device}: {notes}\n{table(results)}")
    if options.results:
        append_results(options.results, results, setting, notes, options.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
