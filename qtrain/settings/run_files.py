"""The files that a run and a sweep leave in their folders: their names, and the config in them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from qtrain.utils.atomic_write import write_text
from qtrain.utils.errors import ConfigError

CONFIG = "config.yaml"
"""The config as it ran."""

SUMMARY = "summary.json"
METRICS = "metrics.jsonl"

RESULTS = "results.csv"
"""The rows of a run."""

ALLOCATION = "allocation.yaml"
SCORES = "scores.json"
"""How much the loss is expected to rise with each layer's bits, beside an allocation that was found by it."""

STUDENT = "student.safetensors"
"""A student, packed: what its cost counts, and how its network is built. :mod:`qtrain.packed` reads it."""

LATENT = "student.ckpt"
"""The student's state dict with the weights that training moves, in floating point, for further training."""

EXAMPLES = "examples.json"
"""Some test images and what the run's models say of them."""

LOCK, HOLDER = ".lock", ".holder"
"""The file that is locked while a run goes on, in which ``filelock`` may write, and the one in which its holder says
that it lives; empty when it has ended."""

STAGES = "stages"
"""Folder of what each stage of a run keeps."""

CHECKPOINTS = "checkpoints"

FORMER = ".former"
"""The folder inside of a run's own in which the run before it waits."""

TRIALS = "trials.jsonl"
"""What became of the trials of a sweep."""


def read_config(file: Path) -> dict[str, Any]:
    """The resolved config that a run or a sweep has left in ``file``. Raises ``ConfigError`` where it is damaged."""
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{file} holds a {type(config).__name__}, not a config")
    return config


def write_config(file: Path, config: Mapping[str, Any]) -> None:
    """Write a resolved config; the file appears whole, since other ranks look into it."""
    write_text(file, yaml.safe_dump(dict(config), sort_keys=False))


EXPORTED = "export"
"""The folder of a student's export."""

VERDICT = "verify.json"
"""In that folder: the comparison of the export with the student."""

SPEED = "benchmark.json"
"""In that folder, once ``task=benchmark`` has run: times of the export beside others, on the machine it names."""
