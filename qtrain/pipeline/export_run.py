"""The export of a run's student: from settings to the folder, and the row of a results file."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qtrain.data.base import VisionData
from qtrain.deployment.parity.runtimes import RUNTIME_NAMES, chosen
from qtrain.deployment.parity.verdict import Verdict
from qtrain.deployment.parity.verify import REFERENCE
from qtrain.nn.many_bits import label
from qtrain.packed.save import file_alone
from qtrain.pipeline.evaluate import normalized
from qtrain.pipeline.examples import write_pictures
from qtrain.pipeline.export_folder import BATCH, MODEL, Given, Shipped, check_files, write_files
from qtrain.pipeline.load_data import load_data
from qtrain.pipeline.results import append_row, provenance
from qtrain.pipeline.run_folder import typical_bits
from qtrain.pipeline.student_file import (
    allocation_of,
    check_images,
    check_square,
    described,
    load_trained,
    student_at,
    width_in_use,
)
from qtrain.settings.run_files import CONFIG, EXPORTED
from qtrain.settings.run_settings import RunSettings
from qtrain.utils.errors import ConfigError, as_config_error

log = logging.getLogger(__name__)

PICTURES = "images"
"""Folder of a few test images in that of the export."""


def shipped(settings: RunSettings) -> Shipped:
    """The student of ``settings.checkpoint`` and the folder of its export; of many bits the width of ``settings.bits``.

    Raises ``ConfigError`` where there is no student, or none that takes square images.
    """
    if settings.checkpoint is None:
        raise ConfigError(f"checkpoint: task={settings.task} needs a student; give checkpoint=RUN_FOLDER or its file")
    file = student_at(settings.checkpoint)
    header, student = load_trained(settings, file)
    check_square(header.images, "checkpoint", task=settings.task)
    alone, name = None, EXPORTED
    if (width := width_in_use(settings, file)) is not None:
        alone, name = file_alone(header, student, [header.network.builder]), f"{EXPORTED}-{label(width)}"
    folder = Path(settings.export.output).expanduser() if settings.export.output else file.parent / name
    return Shipped(header, student, file, folder, alone)


def write_export(settings: RunSettings, what: Shipped) -> Verdict:
    """Write the export of ``what`` to its folder, compare it with the student, and write what came out.

    A few test images lie beside it as PNG files, to try it on, where the images are known and gray or in color.
    Raises ``ConfigError`` where the student has no form in ONNX, or a runtime is not installed, before anything is
    written.
    """
    with as_config_error("export"):
        _check_runtimes(settings, what)
        write_files(what, opset=settings.export.opset, batch=settings.export.batch, weights=settings.export.weights)
    data = _test_data(settings, what)
    verdict = _compared(settings, what, data)
    if not isinstance(data, ConfigError) and data.info.in_channels in (1, 3):
        write_pictures(data, what.folder / PICTURES)
    return verdict


def check_export(settings: RunSettings, what: Shipped) -> Verdict:
    """Compare the ONNX file in the folder of ``what`` with the student, and write what came out beside it."""
    file = what.folder / MODEL
    if not file.is_file():
        raise ConfigError(f"export.output: there is no file {file}; task=export writes it")
    with as_config_error("export"):
        _check_runtimes(settings, what)
    return _compared(settings, what, _test_data(settings, what))


def _check_runtimes(settings: RunSettings, what: Shipped) -> None:
    """Raise ``ValueError`` where a runtime is not installed; warn where the student's own is not compared."""
    compared, target = chosen(settings.export.runtimes), str(what.header.origin.get("target", ""))
    if target in RUNTIME_NAMES and target not in compared:
        log.warning(
            "the student is for %s, which is not compared; export.runtimes=[%s] compares it too",
            RUNTIME_NAMES[target],
            ",".join([*compared, target]),
        )


def _compared(settings: RunSettings, what: Shipped, data: VisionData | ConfigError) -> Verdict:
    with as_config_error(str(what.folder / MODEL)):
        verdict, found = check_files(what, _given(settings, what, data), settings.export.runtimes)
    if settings.results:
        seconds = {"reference_cpu_s": next(tier.cpu_s for tier in verdict.tiers if tier.name == REFERENCE)}
        append_row(settings.results, provenance() | _row(settings, what, found) | seconds)
    return verdict


def _test_data(settings: RunSettings, what: Shipped) -> VisionData | ConfigError:
    """The data of the run that the student is from, or why they are not known for a file alone."""
    try:
        data = load_data(normalized(settings, what.header.images), synthesizes=False)
        check_images(what.header.images, data.info, what.file)
    except ConfigError as error:
        if (what.file.parent / CONFIG).is_file():
            raise
        return error
    return data


def _given(settings: RunSettings, what: Shipped, data: VisionData | ConfigError) -> Given:
    """The test images, or noise where the student's images are not known."""
    wanted = settings.export.images
    if isinstance(data, ConfigError):
        log.warning("noise is compared, since the student's images are not known (%s)", data)
        seed = torch.Generator().manual_seed(0)
        noise = torch.randn(wanted, *what.header.images.size, generator=seed)
        return Given([(images, None) for images in noise.split(BATCH)], wanted, "noise")
    return Given(((batch.image, batch.target) for batch in data.test_dataloader()), wanted, "test images")


def _row(settings: RunSettings, what: Shipped, found: Mapping[str, Any]) -> dict[str, object]:
    """The row of a results file; of each comparison, how many codes and predictions differ from the student's."""
    header = what.header
    weight, inputs = typical_bits(allocation_of(header))
    top1 = dict(found.get("top1", {}))
    row: dict[str, object] = {
        "experiment": header.origin.get("experiment", ""), "task": settings.task,
        "dataset": settings.data.plain["name"], **described(header), "w_bits": weight, "a_bits": inputs,
        "seed": header.origin.get("seed", ""), "target": header.origin.get("target", ""),
        "top1": top1.pop("onnxruntime", ""),
        "fp_top1": header.metrics.get("fp_top1"), "size_bytes": header.size_bytes,
        "file_bytes": what.file.stat().st_size, "onnx_bytes": (what.folder / MODEL).stat().st_size,
        "student_top1": top1.pop("student", ""), "test_images": found.get("test_images", ""),
        "compared_images": found["images"], "passed": found["passed"],
    }  # fmt: skip
    row |= {f"{runtime}_top1": accuracy for runtime, accuracy in top1.items()}
    for tier in found["tiers"][1:]:
        name = tier["name"].replace(",", "").replace(" ", "_")
        row[f"{name}_codes"] = sum(layer["differing"] for layer in tier["layers"])
        row[f"{name}_predictions"] = len(tier["disagreeing"])
    return row
