"""The settings of a run: what conf/config.yaml explains, as frozen values.

A field of type :class:`Component` holds a choice from a group: what may stand there is the signature of its target, not
this file. ``qtrain/config/`` derives the schema of the YAML files from these classes, so each key is declared once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from qtrain.settings.component import Component
from qtrain.settings.run_identity import comparable, hash_of, recorded, without_seeds
from qtrain.settings.sweep_settings import SweepSettings

NOT_A_KEY = {"config": False}
"""Metadata of a field that no config sets."""


@dataclass(frozen=True, kw_only=True)
class OperationBits:
    """Bits of operations beside the layers; ``None`` leaves them to the target, or in full precision."""

    add: int | None = None
    multiply: int | None = None
    matmul: int | None = None
    softmax: int | None = None
    concat: int | None = None
    max_pool: int | None = None
    average_pool: int | None = None
    activation: int | None = None
    norm: int | None = None


@dataclass(frozen=True, kw_only=True)
class QuantizeSettings:
    enabled: bool
    fold: str
    equalize: Component | None = None
    calibration: str
    calibration_batches: int
    rounding: Component | None = None
    bias: Component | None = None
    weight: Component
    input: Component
    weight_wrapper: Component | None = None
    weight_observer: Component
    input_observer: Component
    bits: Component
    policies: Mapping[str, Component | None]
    operations: OperationBits
    gradient: Component | None = None


@dataclass(frozen=True, kw_only=True)
class AllocateSettings:
    """What a search over bits chooses from, and what it must not exceed.

    ``budgets`` are numbers or texts such as ``80%`` by the name of one of ``costs``. ``pinned`` maps patterns of layers
    to [weight, input] bits, and ``tied`` a name of no meaning to patterns of layers that get the same bits.
    """

    weight: tuple[int, ...]
    input: tuple[int, ...]
    budgets: Mapping[str, Any]
    pinned: Mapping[str, Any]
    tied: Mapping[str, tuple[str, ...]]
    batches: int
    weight_error: float | None
    score: Component
    costs: Mapping[str, Component | None]
    folder: str


@dataclass(frozen=True, kw_only=True)
class ManyBitsSettings:
    """``objective`` is that of all widths but the widest, which is their teacher; ``widths`` of ``None``: one width."""

    widths: tuple[int, ...] | None = None
    objective: Component | None = None


@dataclass(frozen=True, kw_only=True)
class TeacherCacheSettings:
    keeps: Component | None = None
    folder: str


@dataclass(frozen=True, kw_only=True)
class TeacherSettings:
    model: Component | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    compile: bool | str = False
    shard: bool = False
    learns: bool = False
    objective: Component | None = None
    lr: float | None = None
    cache: TeacherCacheSettings


@dataclass(frozen=True, kw_only=True)
class DistillSettings:
    teacher_weights: str | None
    hard: float
    soft: float
    temperature: float
    hint: float
    student_layers: tuple[str, ...]
    teacher_layers: tuple[str, ...] | None


@dataclass(frozen=True, kw_only=True)
class FreezeSettings:
    layers: tuple[str, ...] | None
    share: float | None


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    epochs: int
    share: float
    carry_optimizer: bool
    freeze: FreezeSettings
    scale_lr: float | None
    norm_decay: bool
    clip_norm: float | None
    weight_average: float | None
    reestimate_bn: int
    compile: bool | str
    sync_batchnorm: bool
    checkpoint_every_steps: int
    shard: bool
    precision: str | None
    channels_last: bool
    final_test: bool
    log_every_steps: int
    health_every_steps: int


@dataclass(frozen=True, kw_only=True)
class FullPrecisionSettings:
    """``all_labels``: the training also uses the labels that ``data.labeled`` hides."""

    folder: str
    epochs: int
    all_labels: bool = False
    optimizer: Component
    lr_schedule: Component


@dataclass(frozen=True, kw_only=True)
class SynthesizeSettings:
    images: int
    models: Mapping[str, Component | None]
    folder: str
    workers: int | None
    rank: int
    world_size: int


@dataclass(frozen=True, kw_only=True)
class PredictSettings:
    output: str | None
    top_k: int
    batch_size: int
    workers: int | None


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    output: str | None
    images: int
    opset: int
    weights: str
    batch: int | None
    runtimes: tuple[str, ...] | None


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings:
    batch: int
    rounds: int
    threads: int
    images: int


@dataclass(frozen=True, kw_only=True)
class ProfileSettings:
    output: str | None
    runtime: str
    widths: tuple[int, ...]
    rounds: int
    threads: int


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    folder: str


@dataclass(frozen=True, kw_only=True)
class ReviewSettings:
    folder: str | None
    project: str
    entity: str | None
    group: str | None
    accuracy: str | None
    knobs: tuple[str, ...] | None


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """All settings of a run. ``plain`` is the config that they were made of, resolved, as dicts, lists and values.

    ``stages`` are the settings of each fit of the run, by the stage's name, in order; none for a run of one fit.
    """

    data: Component
    model: Component
    teacher: TeacherSettings
    target: Component | None = None
    quantize: QuantizeSettings
    allocate: AllocateSettings
    many_bits: ManyBitsSettings = ManyBitsSettings()
    objective: Component
    optimizer: Component
    lr_schedule: Component
    trainer: Component
    logger: Mapping[str, Component]
    callbacks: Mapping[str, Component | None]
    distill: DistillSettings
    fit: FitSettings
    full_precision: FullPrecisionSettings
    synthesis: Component | None = None
    synthesize: SynthesizeSettings
    sweep: SweepSettings
    predict: PredictSettings
    export: ExportSettings
    benchmark: BenchmarkSettings
    profile: ProfileSettings
    report: ReportSettings
    review: ReviewSettings
    task: str
    experiment: str | None
    name: str | None
    run_dir: str
    seed: int
    budget: str
    budgets: Mapping[str, Mapping[str, Any]]
    output: str
    resume: bool
    overwrite: bool
    results: str | None
    variants: Mapping[str, tuple[str, ...]]
    select: tuple[str, ...] | None
    checkpoint: str | None
    bits: int | None = None
    images: tuple[str, ...] | None
    allow_targets: tuple[str, ...]
    stages: Mapping[str, "RunSettings"] = field(default_factory=dict)
    plain: Mapping[str, Any] = field(metadata=NOT_A_KEY, repr=False)

    @cached_property
    def identity(self) -> str:
        """A hash that two settings share exactly if a run of one may go on as a run of the other."""
        return hash_of(comparable(recorded(self.plain)))

    @cached_property
    def recipe(self) -> str:
        """A hash that two settings share exactly if they differ in nothing but seeds."""
        return hash_of(without_seeds(comparable(recorded(self.plain))))

    @property
    def fits(self) -> list["RunSettings"]:
        """The settings of each fit of the run, in order: its stages, or the run itself."""
        return list(self.stages.values()) or [self]

    @property
    def epochs(self) -> float:
        """Epochs of the whole run."""
        return sum(one.fit.share * one.fit.epochs for one in self.fits)

    def with_sections(self, other: "RunSettings", *names: str) -> "RunSettings":
        """These settings with the sections ``names`` of ``other``."""
        plain = {**self.plain, **{name: other.plain[name] for name in names}}
        return replace(self, plain=plain, **{name: getattr(other, name) for name in names})


Compose = Callable[[Sequence[str]], RunSettings]
"""From overrides, as on the command line, to settings. Raises ``ConfigError``."""

Read = Callable[[Mapping[str, Any]], RunSettings]
"""From a resolved config that was written down before to settings. Raises ``ConfigError``."""
