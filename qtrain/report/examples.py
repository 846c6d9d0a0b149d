"""Some test images on the page, with what each model says of them, from the ``examples.json`` of the runs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtrain.pipeline.summary import CALIBRATED, FLOAT, WAYS, Run, RunSummary
from qtrain.settings.run_files import EXAMPLES

SHOWN = 12
"""So many images, those that most models get wrong."""


@dataclass(frozen=True)
class Answers:
    """What one model says of the images shown, each with whether it is right; ``right`` counts all that were kept."""

    model: str
    said: tuple[tuple[str, bool], ...]
    right: int


@dataclass(frozen=True)
class Examples:
    """``images`` are PNGs in base64, ``kept`` says of how many they were chosen."""

    images: tuple[str, ...]
    labels: tuple[str, ...]
    rows: tuple[Answers, ...]
    kept: int


def read_examples(runs: Sequence[Run]) -> Examples | None:
    """The examples of all ``runs`` that have the same images as the first that has any; ``None`` where none has."""
    images: list[str] = []
    labels: list[str] = []
    said: dict[tuple[float, int, str], list[str]] = {}
    for run in runs:
        found = _content(run.folder / EXAMPLES)
        if found is None or (images and (found["images"], found["labels"]) != (images, labels)):
            continue
        images, labels = found["images"], found["labels"]
        for way, answers in found["answers"].items():
            said.setdefault(_place(run, way, said, answers), answers)
    if not said:
        return None
    wrong = [sum(answers[i] != label for answers in said.values()) for i, label in enumerate(labels)]
    shown = sorted(sorted(range(len(labels)), key=lambda i: -wrong[i])[:SHOWN])
    return Examples(
        images=tuple(images[i] for i in shown),
        labels=tuple(labels[i] for i in shown),
        rows=tuple(
            Answers(
                model=name,
                said=tuple((answers[i], answers[i] == labels[i]) for i in shown),
                right=sum(answer == label for answer, label in zip(answers, labels, strict=True)),
            )
            for (_, _, name), answers in sorted(said.items())
        ),
        kept=len(labels),
    )


def _place(
    run: Run, way: str, said: Mapping[tuple[float, int, str], list[str]], answers: list[str]
) -> tuple[float, int, str]:
    """Where a model's row stands, and its name: the run's too, where another model has that name and says otherwise."""
    name = way if way == FLOAT else f"{run.summary.bits} {way}"
    bits = 0.0 if way == FLOAT else -_bits(run.summary)
    place = (bits, WAYS.index(way), name) if way != FLOAT else (-1e9, 0, name)
    same = said.get(place)
    if same is None or (same == answers and way in (FLOAT, CALIBRATED)):
        return place
    return (*place[:2], f"{name}, {run.folder.name}")


def _bits(summary: RunSummary) -> float:
    return sum(float(bits) for bits in (summary.w_bits, summary.a_bits) if isinstance(bits, int | float))


def _content(file: Path) -> dict[str, Any] | None:
    """The content of ``examples.json``; ``None`` where it is absent or damaged, since the page can do without."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        lengths = {len(found["images"]), len(found["labels"]), *map(len, found["answers"].values())}
        return found if len(lengths) == 1 and set(found["answers"]) <= set(WAYS) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
