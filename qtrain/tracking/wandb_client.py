"""Calls of W&B's client: defining metrics, logging tables, publishing files, and the place of its own files."""

from __future__ import annotations

import math
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtrain.utils.atomic_write import write_text
from qtrain.utils.compat import publish_artifact

if TYPE_CHECKING:
    import wandb

AXES = ("step", "epoch", "layer")
"""Metrics on x axes: optimizer steps, epochs, and the number of a layer in the order of the forward."""

TOP1 = "val/top1"

DATA_DIR = "WANDB_DATA_DIR"

RUN_ID = "wandb_run_id.txt"
"""The file in a run's folder that stores the id of its W&B run."""

ALLOCATION_COLUMNS = ("name", "kind", "weights", "weight_bits", "input_bits", "effective_bits", "macs", "bops")
"""Columns of the table ``allocation``, after the number of the layer."""


def run_id(folder: Path) -> str:
    """The id of the W&B run of ``folder``; the first call makes it."""
    path = folder / RUN_ID
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, uuid.uuid4().hex[:12] + "\n")
    return path.read_text(encoding="utf-8").strip()


def define_metrics(run: wandb.Run) -> None:
    """Define the x axis of each metric, and its value in the run's summary."""
    for axis in AXES:
        run.define_metric(axis, hidden=True)
    run.define_metric("train/*", step_metric="step")
    run.define_metric("test/*", step_metric="step")
    run.define_metric("val/*", step_metric="epoch")
    run.define_metric(TOP1, step_metric="epoch", summary="max,last")
    run.define_metric("val/loss", step_metric="epoch", summary="min,last")
    run.define_metric("bits/*", step_metric="layer", summary="mean")


def log_table(run: wandb.Run, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    import wandb

    columns = list(dict.fromkeys(key for row in rows for key in row))
    data = [[_cell(row.get(column)) for column in columns] for row in rows]
    run.log({name: wandb.Table(columns=[*columns], data=data, allow_mixed_types=True)})


def log_layers(run: wandb.Run, layers: Sequence[Mapping[str, Any]]) -> None:
    """Log the table ``allocation`` and curves of bits by layer, once for a run even if it is resumed."""
    summary: Any = run.summary
    if "allocation" in summary.keys():  # noqa: SIM118 - a summary iterates otherwise
        return
    rows = [
        {"layer": number} | {name: row.get(name) for name in ALLOCATION_COLUMNS} for number, row in enumerate(layers)
    ]
    log_table(run, "allocation", rows)
    for number, layer in enumerate(layers):
        run.log({"layer": number, "bits/weight": layer.get("weight_bits"), "bits/input": layer.get("input_bits")})


def publish(
    run: wandb.Run, files: Mapping[str, Path], name: str, kind: str, about: Mapping[str, Any], *, used: bool
) -> None:
    import wandb

    artifact = wandb.Artifact(artifact_name(name), kind, metadata={k: v for k, v in about.items() if finite(v)})
    for entry, file in files.items():
        # The file itself is uploaded, not a copy: files of a run are only replaced as a whole, never changed.
        artifact.add_file(str(file.resolve()), name=entry, policy="immutable", skip_cache=True)
    artifact.finalize()
    publish_artifact(run, artifact, used=used)


def named_knobs(knobs: Mapping[str, Any]) -> dict[str, Any]:
    """``knobs`` without those that are ``None``, and with no dots in names, which W&B takes for sections.

    >>> named_knobs({"widths.layer1.0": 4})
    {'widths_layer1_0': 4}
    """
    return {name.replace(".", "_"): value for name, value in knobs.items() if value is not None}


def artifact_name(text: str) -> str:
    """``text`` as a name that W&B allows for an artifact: other characters are replaced, and it is cut at 128.

    >>> artifact_name("cifar10/resnet20 w4a4")
    'cifar10-resnet20-w4a4'
    """
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text)[:128]


def remove_parts_before(place: Path) -> None:
    """Remove the parts of an offline run that precede ``place``: the newest part holds all rows."""
    run = place.name.rpartition("-")[2]
    for part in place.parent.glob(f"offline-run-*-{run}"):
        if part.name < place.name:
            shutil.rmtree(part, ignore_errors=True)


@contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """Inside, the environment variable ``name`` is ``value``, unless the user has set it."""
    if name in os.environ:
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)


def finite(value: object) -> bool:
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


def _cell(value: object) -> object:
    return value if value is None or isinstance(value, str | int | float) else str(value)
