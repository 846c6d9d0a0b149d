"""Floor 6: one file a verb. Light to import, because help and every mistyped command pass through here."""

from __future__ import annotations

from pathlib import Path

TASKS = {
    "train": "quantise and train a student, with or without a teacher (the default)",
    "tune": "find temperature and weight of distillation for a bit width, on validation images",
    "sweep": "many trials over bit widths, schedules and settings, and the front of the best",
    "calibrate": "quantise without training: calibrated, and corrected or rounded by learning where asked",
    "synthesize": "images from nothing but a model, for data=synthetic",
    "evaluate": "accuracy of given weights on the test images",
    "report": "one HTML page and a plot of all runs below a folder",
    "review": "the workspace in W&B that shows accuracy against compression",
}
"""Verb -> what it does. `qtrain/tasks/<verb>.py` has `run(cfg)`."""


def conf_dir() -> Path:
    """The folder of YAML files: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "conf"
    return inside if (inside / "config.yaml").is_file() else package.parent / "conf"
