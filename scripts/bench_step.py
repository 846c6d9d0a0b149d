"""What one training step costs: full precision, the quantized student, the student with its teacher, live or cached.

    python scripts/bench_step.py                                       # ResNet-20, W4A4, batch 128, eager and compiled
    python scripts/bench_step.py --no-eager --threads 2 --results results/bench.csv
    python scripts/bench_step.py quantize.bits.weight=2 model=cifar_resnet56      # any overrides of the experiment
    python scripts/bench_step.py --size 64 --batch 32 model=timm model.name=resnet18 teacher=none objective=hard
    python scripts/bench_step.py --variants cifar10/shootout --rounds 3 --steps 2 --no-compile   # each of its students

A step is what the training module does: forward, objective, backward, optimizer step, with the experiment's own
quantizers, teacher, optimizer and parameter groups; weights and images are random, since time does not depend on
them. All cases run in one process, in rounds of a few steps each, so that whatever else slows the machine slows all
alike. Times are medians over the rounds; a ratio is the median of the rounds' own ratios. What a forward saves for its
backward is counted exactly: activations, without parameters and the batch. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
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
from qtrain.training.optim import parameter_groups
from qtrain.training.step import StudentStep
from qtrain.utils.compiled import Compiled
from qtrain.utils.saved_tensors import SavedTensors

EXPERIMENT = "cifar10/resnet20_w4a4"
CLASSES, CHANNELS = 10, 3

SAMPLES = 50_000
"""Samples of the data set that a batch is taken from."""

FULL, STUDENT, TEACHER, DISTILLED = "full precision", "student", "teacher forward", "student with teacher"
CACHED = "student with cached teacher"
BASES = {STUDENT: (FULL,), DISTILLED: (STUDENT, TEACHER), CACHED: (STUDENT,)}
"""Case -> the cases whose summed time is the 1 of its ratio."""
QUANTIZED = (STUDENT, DISTILLED, CACHED)


@dataclass(frozen=True)
class Setting:
    """Where and with what a case runs: ``image`` (N, C, H, W) and ``target`` (N,) lie on the device."""

    cfg: RunSettings
    image: Tensor
    target: Tensor
    bf16: bool
    compiled: bool

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


@dataclass(frozen=True)
class Work:
    """What a case does once, and the tensors that it has in memory anyway: parameters, buffers, the batch."""

    run: Callable[[], None]
    known: Sequence[Tensor]


@dataclass
class Measured:
    """Milliseconds of one step, round by round; rounds of different cases with one number belong together.

    ``saved`` are the bytes that one forward keeps for its backward.
    """

    case: str
    compiled: bool
    ms: list[float]
    saved: int = 0

    @property
    def mode(self) -> str:
        return "compiled" if self.compiled else "eager"


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


def training_step(setting: Setting, student: nn.Module, objective: Objective, teacher: Teacher | None) -> Work:
    """One step, as :class:`qtrain.training.module.QATModule` and Lightning make it."""
    module = StudentStep(student=student.train(), objective=objective).to(setting.device)
    step: Callable[..., dict[str, Tensor]] = module
    if setting.compiled:  # full precision as torch compiles it by itself, which is faster for it
        step = Compiled(module) if quantizers_of(student) else torch.compile(module, fullgraph=True, dynamic=False)
    groups = parameter_groups([student, objective], scale_lr=setting.cfg.fit.scale_lr)
    optimizer = setting.cfg.optimizer.build()(groups)
    batch = setting.batch

    def run() -> None:
        precision = torch.autocast(setting.device.type, dtype=torch.bfloat16) if setting.bf16 else nullcontext()
        with precision:
            answer = () if teacher is None else teacher.answer(batch, 0)
            losses = step(batch.image, batch.target, *answer)
        optimizer.zero_grad()
        losses["total"].backward()
        optimizer.step()

    return Work(run, [*module.parameters(), *module.buffers(), batch.image, batch.target])


def make_cases(setting: Setting) -> dict[str, Work]:
    """Case -> what does it once. Each has a model, an objective and an optimizer of its own.

    Without a teacher there are two: full precision and the student.
    """
    cfg, size = setting.cfg, setting.size
    labels = {name: Objective(terms={"hard": Hard()}) for name in (FULL, STUDENT)}
    cases = {
        FULL: training_step(setting, build(cfg.model, size), labels[FULL], None),
        STUDENT: training_step(setting, quantized(cfg, size), labels[STUDENT], None),
    }
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


def measure(
    cases: Sequence[tuple[Measured, Work]], *, device: torch.device, rounds: int, steps: int, warmup: int
) -> None:
    """Add ``rounds`` times of each case, in milliseconds a step, each the mean over ``steps`` steps in a row.

    Before, one step more tells what it saves.
    """
    for measured, work in cases:
        for _ in range(warmup):
            work.run()
        measured.saved = saved_bytes(work)
    for number in range(rounds):
        # To and fro, so that a machine that grows warmer favors no case.
        for measured, work in cases if number % 2 == 0 else reversed(cases):
            run = work.run
            run()  # brings the case's own memory into the caches
            synchronize(device)
            start = time.perf_counter()
            for _ in range(steps):
                run()
            synchronize(device)
            measured.ms.append(1e3 * (time.perf_counter() - start) / steps)


def saved_bytes(work: Work) -> int:
    """What one step saves between its forward and its backward."""
    with SavedTensors(work.known) as saved:
        work.run()
    return saved.bytes


def synchronize(device: torch.device) -> None:
    """Wait until ``device`` has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio(measured: Measured, others: Sequence[Measured]) -> float | None:
    """Median over rounds of this case's time in units of its bases' in the same mode; ``None`` where it has none."""
    bases = [o for o in others if o.compiled == measured.compiled and o.case in bases_of(measured.case)]
    if not bases:
        return None
    sums = [sum(times) for times in zip(*(base.ms for base in bases), strict=True)]
    middle: float = statistics.median(own / base for own, base in zip(measured.ms, sums, strict=True))
    return middle


def saved_ratio(measured: Measured, others: Sequence[Measured]) -> float | None:
    """The bytes that this case saves in units of what full precision saves in the same mode."""
    full = [one.saved for one in others if one.compiled == measured.compiled and one.case == FULL]
    return measured.saved / full[0] if full and measured.saved and measured.case != FULL else None


def bases_of(case: str) -> tuple[str, ...]:
    """The cases whose summed time is the 1 of ``case``'s ratio; a variant's is full precision."""
    return () if case in (FULL, TEACHER) else BASES.get(case, (FULL,))


def table(results: Sequence[Measured]) -> str:
    """One line for each case and mode: median, least and greatest time, and the ratio with what it refers to."""
    lines = [f"{'case':<34}{'mode':<10}{'ms/step':>9}{'least':>9}{'most':>9}{'saved MB':>10}{'ratio':>8}"]
    for one in results:
        line = f"{one.case:<34}{one.mode:<10}{statistics.median(one.ms):9.2f}{min(one.ms):9.2f}{max(one.ms):9.2f}"
        line += f"{one.saved / 1e6:10.1f}"
        if (share := ratio(one, results)) is not None:
            line += f"{share:8.3f} of {' + '.join(bases_of(one.case))}"
        if (memory := saved_ratio(one, results)) is not None:
            line += f", saves {memory:.3f} of {FULL}"
        lines.append(line)
    return "\n".join(lines)


def append_results(path: Path, results: Sequence[Measured], setting: Setting, notes: str) -> None:
    """A row for each case and mode, with the columns ``case``, ``mode`` and ``ratio`` after the common ones."""
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
                "step_ms": statistics.median(one.ms),
                "notes": notes,
                "name": variant,
                "case": STUDENT if variant else one.case,
                "mode": one.mode,
                "ratio": ratio(one, results),
                "saved_bytes": one.saved or None,
                "saved_ratio": saved_ratio(one, results),
            },
        )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--batch", type=int, default=128, help="images in a step (default: %(default)s)")
    parser.add_argument("--size", type=int, default=32, help="height and width of the images in pixels (%(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="times that each case has its turn (%(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="steps in a turn (%(default)s)")
    parser.add_argument("--warmup", type=int, default=3, help="steps of each case before the first round (%(default)s)")
    parser.add_argument("--threads", type=int, help="threads of torch; default: as torch chooses")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--eager", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--results", type=Path, help="CSV file that gets a row for each case and mode")
    parser.add_argument("--variants", metavar="EXPERIMENT", help="measure each variant of an experiment instead")
    parser.add_argument("overrides", nargs="*", help=f"key=value, laid over +experiment={EXPERIMENT}")
    options = parser.parse_args(arguments)
    for name in ("batch", "size", "rounds", "steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    if not (options.eager or options.compile):
        parser.error("--no-eager and --no-compile together leave nothing to measure; drop one")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
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
        setting = Setting(cfg, image, target, bf16, compiled)
        made = variant_cases(setting, overrides) if options.variants else make_cases(setting)
        cases += [(Measured(case, compiled, []), run) for case, run in made.items()]
    measure(cases, device=device, rounds=options.rounds, steps=options.steps, warmup=options.warmup)
    results = [measured for measured, _ in cases]
    notes = (
        f"batch={options.batch} size={options.size} {'bf16' if bf16 else 'float32'} channels_last "
        f"rounds={options.rounds} steps={options.steps} threads={torch.get_num_threads()}"
    )
    teacher = "" if options.variants or cfg.teacher.model is None else f", teacher {cfg.teacher.model.name}"
    print(f"{cfg.model.name}{teacher}, {device}: {notes}\n{table(results)}")
    if options.results:
        append_results(options.results, results, setting, notes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
