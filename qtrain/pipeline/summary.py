"""What a run says of itself when it ends, and the runs below a folder.

Each run leaves one ``summary.json`` in its folder; the closing table and the report read only these and
``metrics.jsonl``, so that both can be made again at any time, also of runs from another machine.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, cast

from qtrain.settings.run_files import FORMER, METRICS, SUMMARY, TRIALS
from qtrain.spec import FULL_PRECISION
from qtrain.utils.atomic_write import write_text
from qtrain.utils.bit_text import from_text
from qtrain.utils.walk import walk

FINISHED = "finished"
"""The ``status`` of a run that came to its end; any other is shown as the reason why it did not."""

FLOAT, CALIBRATED, TRAINED, DISTILLED = "full precision", "calibrated only", "trained", "distilled"
WAYS = (FLOAT, CALIBRATED, TRAINED, DISTILLED)
"""How a model came by its accuracy, in the order in which tables list them."""

NUMBERS = (
    "top1 fp_top1 ptq_top1 test_images size_bytes file_bytes header_bytes fp_size_bytes compression effective_bits "
    "macs bops fp_bops step_ms wall_s"
).split()
"""Fields of a summary that are a number or null."""

TEXTS = "experiment name dataset model quantizer status data_hash recipe_hash".split()
"""Fields of a summary that are text or null."""

RIGHT = {"top1": "right", "fp_top1": "fp_right"}
"""Accuracy -> the field that says which test images it counts, so that models are compared image by image."""


Figures = dict[str, dict[str, Any]]
"""Fields of a summary for each width of a student of many bits, by its label, as ``w4``."""


@dataclass(frozen=True)
class RunSummary:
    """The content of ``summary.json``. Accuracies are in percent, sizes in bytes, ``wall_s`` in seconds.

    ``fp_top1`` is the accuracy before quantization, ``ptq_top1`` after calibration and before training, ``top1`` at the
    end, all on ``test_images`` images; ``right`` and ``fp_right`` say which of them ``top1`` and ``fp_top1`` count, as
    the text of :mod:`qtrain.utils.bit_text`. Runs that share ``data_hash`` have the same images; those that share
    ``recipe_hash`` differ in nothing but seeds. ``file_bytes`` is the length of ``student.safetensors``, of which
    ``header_bytes`` say how its network is built and the other ``size_bytes`` are counted. ``distill`` is false, or
    true, or names the terms. ``layers`` are rows of :mod:`qtrain.costs.count`. Of a student of many bits all this is of
    the widest, as if it were alone, but for the file; ``widths`` has the figures of each width.
    """

    experiment: str | None = None
    name: str | None = None
    dataset: str | None = None
    model: str | None = None
    quantizer: str | None = None
    w_bits: int | float | str | None = None
    a_bits: int | float | str | None = None
    distill: bool | str | None = None
    seed: int | None = None
    epochs: int | float | None = None
    top1: float | None = None
    fp_top1: float | None = None
    ptq_top1: float | None = None
    right: str | None = None
    fp_right: str | None = None
    test_images: int | None = None
    size_bytes: int | None = None
    file_bytes: int | None = None
    header_bytes: int | None = None
    fp_size_bytes: int | None = None
    compression: float | None = None
    effective_bits: float | None = None
    macs: int | None = None
    bops: int | None = None
    fp_bops: int | None = None
    step_ms: float | None = None
    wall_s: float | None = None
    status: str = FINISHED
    data_hash: str | None = None
    recipe_hash: str | None = None
    widths: Figures = field(default_factory=dict)
    layers: list[dict[str, Any]] = field(default_factory=list)

    def metrics(self, names: Sequence[str]) -> dict[str, float | None]:
        """The fields ``names``, and of each width those that it has, as ``top1/w4``."""
        own = {f"{name}/{w}": found[name] for name in names for w, found in self.widths.items() if name in found}
        return {name: getattr(self, name) for name in names} | own

    def by_width(self) -> list["RunSummary"]:
        """A summary of each width of a student of many bits, with that width's figures; itself where it has only one.

        The file holds all widths, and so its length is the same in each.
        """
        own: dict[str, Any] = {"widths": {}, "ptq_top1": None, "right": None}
        known = {f.name for f in fields(self)} - {"widths"}
        figures = [{name: value for name, value in found.items() if name in known} for found in self.widths.values()]
        return [replace(self, **own | found) for found in figures] or [self]

    @property
    def distilled(self) -> bool:
        return self.distill not in (None, False, "", "none", "no", "false")

    @property
    def full_precision(self) -> bool:
        """Whether the run trained the model with nothing quantized, as for a teacher."""
        return self.w_bits == FULL_PRECISION and self.a_bits == FULL_PRECISION

    @property
    def bits(self) -> str:
        """``W4A4``; :data:`FLOAT` where nothing is quantized; a mixed allocation by the words it was given."""
        if self.full_precision:
            return FLOAT
        weight, input = (f"{b:g}" if isinstance(b, int | float) else b or "?" for b in (self.w_bits, self.a_bits))
        return f"W{weight}A{input}"

    @property
    def way(self) -> str:
        if self.full_precision:
            return FLOAT
        if self.epochs == 0:
            return CALIBRATED
        return DISTILLED if self.distilled else TRAINED


@dataclass(frozen=True)
class Run:
    """A run's folder and what it says of itself."""

    folder: Path
    summary: RunSummary


@dataclass(frozen=True)
class Problem:
    """A folder that looks like a run but cannot be counted, and why."""

    folder: Path
    reason: str


def write_summary(run_dir: Path | str, summary: Mapping[str, object]) -> Path:
    """Write ``summary`` (fields of :class:`RunSummary`, the missing ones are null) to ``run_dir``, atomically.

    Figures that are not finite become null, since JSON has no others. Raises ``TypeError`` for an unknown field.
    """
    path = Path(run_dir) / SUMMARY
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in asdict(RunSummary(**cast("Mapping[str, Any]", summary))).items()
    }
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
    return path


def read_summary(path: Path) -> RunSummary:
    """Raises ``ValueError`` with a one-line reason where the file is damaged; fields of later versions are ignored."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path.name} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds a {type(content).__name__}, not the fields of a run")
    known = {f.name for f in fields(RunSummary)}
    summary = RunSummary(**{name: value for name, value in content.items() if name in known})
    widths = summary.widths
    figures = list(widths.values()) if isinstance(widths, dict) else [None]
    if not all(isinstance(one, dict) and {"w_bits", "a_bits", "top1"} <= one.keys() for one in figures):
        raise ValueError(f"{path.name}: widths does not hold the bits and the top1 of each width: {widths!r}")
    for one in (summary, *summary.by_width()):
        try:
            _check(one)
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error
    return summary


def _check(summary: RunSummary) -> None:
    """Raises ``ValueError`` where a field is not of its type."""
    for name in NUMBERS:
        value = getattr(summary, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{name} is not a number: {value!r}")
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{name} is not finite: {value!r}")
    for name in TEXTS:
        if not isinstance(value := getattr(summary, name), str | None):
            raise ValueError(f"{name} is no text: {value!r}")
    if not isinstance(summary.seed, int | None):
        raise ValueError(f"seed is no whole number: {summary.seed!r}")
    for name in RIGHT.values():
        try:
            if (text := getattr(summary, name)) is not None:
                from_text(text)
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{name} does not say which images are right: {error}") from error
    if not isinstance(summary.layers, list):
        raise ValueError("layers is not a list")


def gather(folder: Path | str) -> tuple[list[Run], list[Problem]]:
    """All runs in ``folder`` and below, by path: those that finished, and those that did not with the reason.

    A folder counts as a run where it holds ``summary.json`` or ``metrics.jsonl``. The trials of a sweep are left to the
    sweep's own page, unless ``folder`` is theirs.
    """
    folder = Path(folder)
    runs: list[Run] = []
    problems: list[Problem] = []
    for place in sorted(Path(place) for place, _, files in walk(folder) if {SUMMARY, METRICS} & set(files)):
        if FORMER in place.parts or any((above / TRIALS).is_file() for above in _between(folder, place)):
            continue
        if not (place / SUMMARY).exists():
            problems.append(Problem(place, f"unfinished: there is no {SUMMARY}; start it again to resume"))
            continue
        try:
            summary = read_summary(place / SUMMARY)
        except ValueError as error:
            problems.append(Problem(place, str(error)))
            continue
        if summary.status != FINISHED:
            problems.append(Problem(place, f"unfinished: {summary.status}"))
        elif summary.top1 is None:
            problems.append(Problem(place, f"{SUMMARY} has no top1"))
        else:
            runs.append(Run(place, summary))
    return runs, problems


def _between(folder: Path, place: Path) -> list[Path]:
    """``folder`` and what lies between it and ``place``."""
    return [above for above in place.parents if above == folder or folder in above.parents]
