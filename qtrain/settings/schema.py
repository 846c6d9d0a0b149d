"""The keys of a run's config and their types. Values and explanations stand in conf/config.yaml.

A field of type ``Any`` holds a group: what may stand there is the signature of its ``_target_``, not this file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class Operations:
    add: int | None = MISSING
    matmul: int | None = MISSING
    softmax: int | None = MISSING


@dataclass
class Quantize:
    enabled: bool = MISSING
    fold: str = MISSING
    equalize: Any = None
    calibration: str = MISSING
    calibration_batches: int = MISSING
    rounding: Any = None
    bias: Any = None
    weight: Any = MISSING
    input: Any = MISSING
    weight_wrapper: Any = None
    weight_observer: Any = MISSING
    input_observer: Any = MISSING
    bits: Any = MISSING
    policies: dict[str, Any] | None = MISSING
    operations: Operations = field(default_factory=Operations)
    gradient: Any = None


@dataclass
class TeacherCache:
    keeps: Any = None
    folder: str = MISSING


@dataclass
class Teacher:
    model: Any = None
    mean: list[float] | None = None
    std: list[float] | None = None
    compile: bool = False
    shard: bool = False
    learns: bool = False
    objective: Any = None
    lr: float | None = None
    cache: TeacherCache = field(default_factory=TeacherCache)


@dataclass
class Distill:
    teacher_weights: str | None = MISSING
    hard: float = MISSING
    soft: float = MISSING
    temperature: float = MISSING
    hint: float = MISSING
    student_layers: list[str] = MISSING
    teacher_layers: list[str] | None = MISSING


@dataclass
class Freeze:
    layers: list[str] | None = MISSING
    share: float | None = MISSING


@dataclass
class Fit:
    epochs: int = MISSING
    share: float = MISSING
    carry_optimizer: bool = MISSING
    freeze: Freeze = field(default_factory=Freeze)
    scale_lr: float | None = MISSING
    norm_decay: bool = MISSING
    clip_norm: float | None = MISSING
    weight_average: float | None = MISSING
    reestimate_bn: int = MISSING
    compile: bool = MISSING
    sync_batchnorm: bool = MISSING
    checkpoint_every_steps: int = MISSING
    shard: bool = MISSING
    precision: str | None = MISSING
    channels_last: bool = MISSING
    final_test: bool = MISSING
    log_every_steps: int = MISSING
    health_every_steps: int = MISSING


@dataclass
class FullPrecision:
    folder: str = MISSING
    epochs: int = MISSING
    optimizer: Any = MISSING
    lr_schedule: Any = MISSING


@dataclass
class Synthesize:
    images: int = MISSING
    models: dict[str, Any] | None = MISSING
    folder: str = MISSING
    workers: int | None = MISSING
    rank: int = MISSING
    world_size: int = MISSING


@dataclass
class Resources:
    cpu: float = MISSING
    gpu: float = MISSING


@dataclass
class Sweep:
    space: dict[str, Any] | None = MISSING
    start: list[dict[str, Any]] = MISSING
    objectives: dict[str, str | None] = MISSING
    search: Any = MISSING
    scheduler: Any = None
    trials: int = MISSING
    time_budget_s: float | None = MISSING
    parallel: int | None = MISSING
    resources: Resources = field(default_factory=Resources)
    workers: int = MISSING
    max_failures: int = MISSING
    address: str | None = MISSING
    storage: str | None = MISSING
    val_fraction: float = MISSING
    test_front: bool = MISSING


@dataclass
class Report:
    folder: str = MISSING


@dataclass
class Review:
    folder: str | None = MISSING
    project: str = MISSING
    entity: str | None = MISSING
    group: str | None = MISSING
    accuracy: str | None = MISSING
    knobs: list[str] | None = MISSING


@dataclass
class Root:
    data: Any = MISSING
    model: Any = MISSING
    teacher: Teacher = field(default_factory=Teacher)
    quantize: Quantize = field(default_factory=Quantize)
    objective: Any = MISSING
    optimizer: Any = MISSING
    lr_schedule: Any = MISSING
    trainer: Any = MISSING
    logger: Any = MISSING
    callbacks: dict[str, Any] | None = MISSING
    distill: Distill = field(default_factory=Distill)
    fit: Fit = field(default_factory=Fit)
    full_precision: FullPrecision = field(default_factory=FullPrecision)
    synthesis: Any = None
    synthesize: Synthesize = field(default_factory=Synthesize)
    sweep: Sweep = field(default_factory=Sweep)
    report: Report = field(default_factory=Report)
    review: Review = field(default_factory=Review)
    task: str = MISSING
    experiment: str | None = MISSING
    name: str | None = MISSING
    run_dir: str = MISSING
    seed: int = MISSING
    budget: str = MISSING
    budgets: dict[str, dict[str, Any]] = MISSING
    output: str = MISSING
    resume: bool = MISSING
    overwrite: bool = MISSING
    results: str | None = MISSING
    stages: dict[str, Any] = MISSING
    variants: dict[str, list[str]] | None = MISSING
    select: list[str] | None = MISSING
    checkpoint: str | None = MISSING
    allow_targets: list[str] = MISSING
