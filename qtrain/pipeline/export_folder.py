"""A student as a folder that runs elsewhere: the ONNX file, proved equal to the student, and a program that uses it."""

import dataclasses
import json
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qtrain.deployment.onnx.write import IMAGES, LOGITS, export
from qtrain.deployment.parity.runtimes import OnnxRuntime, Runtime
from qtrain.deployment.parity.verify import Tier, Verdict, verify
from qtrain.packed.header import Header
from qtrain.pipeline.evaluate import normalized
from qtrain.pipeline.load_data import load_data
from qtrain.pipeline.predict import class_names
from qtrain.pipeline.results import append_row, provenance
from qtrain.pipeline.run_folder import typical_bits
from qtrain.pipeline.student_file import allocation_of, check_images, check_square, described, load_trained, student_at
from qtrain.settings.run_files import CONFIG, STUDENT
from qtrain.settings.run_settings import RunSettings
from qtrain.spec import Batch
from qtrain.utils.atomic_write import atomic_write
from qtrain.utils.errors import ConfigError, as_config_error

log = logging.getLogger(__name__)

MODEL, LABELS, VERDICT, PROGRAM, README = "model.onnx", "labels.json", "verify.json", "run.py", "README.md"
"""Files of the folder, beside the student's own."""

BATCH = 50
"""Images that are compared at a time."""


@dataclass(frozen=True)
class Shipped:
    """What a student's file, its folder and the images to compare on are."""

    header: Header
    student: nn.Module
    file: Path
    folder: Path


def shipped(settings: RunSettings) -> Shipped:
    """The student of ``settings.checkpoint`` and the folder of its export.

    Raises ``ConfigError`` where there is no student, or none that takes square images.
    """
    if settings.checkpoint is None:
        raise ConfigError(f"checkpoint: task={settings.task} needs a student; give checkpoint=RUN_FOLDER or its file")
    file = student_at(settings.checkpoint)
    header, student = load_trained(settings, file)
    check_square(header.images, "checkpoint", task=settings.task)
    folder = Path(settings.export.output).expanduser() if settings.export.output else file.parent / "export"
    return Shipped(header, student, file, folder)


def write_export(settings: RunSettings, what: Shipped) -> Verdict:
    """Write the export of ``what`` to its folder, compare it with the student, and write what came out.

    Raises ``ConfigError`` where the student has no form in ONNX, before anything is written.
    """
    images = what.header.images
    with as_config_error("export"):
        made = export(what.student, images.size, opset=settings.export.opset, metadata=metadata_of(what.header))
    for layer, note in made.lowering.notes.items():
        log.warning("%s: %s", layer, note)
    files = {
        MODEL: made.to_bytes(),
        STUDENT: what.file.read_bytes(),
        LABELS: json.dumps([str(name) for name in class_names(what.header, what.student)], indent=1).encode(),
        PROGRAM: (Path(__file__).parent.parent / "deployment" / "onnx" / "run.py").read_bytes(),
    }
    what.folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        with atomic_write(what.folder / name) as temporary:
            temporary.write_bytes(content)
    return check_export(settings, what)


def check_export(settings: RunSettings, what: Shipped) -> Verdict:
    """Compare the ONNX file in the folder of ``what`` with the student, and write what came out beside it."""
    file = what.folder / MODEL
    if not file.is_file():
        raise ConfigError(f"export.output: there is no file {file}; task=export writes it")
    batches, accuracy = _batches(settings, what, file.read_bytes())
    with as_config_error(str(file)):
        verdict = verify(what.student, batches, what.header.images.size, file.read_bytes())
    found = {
        "passed": verdict.passed,
        "images": verdict.images,
        **accuracy,
        "tiers": [_plain(t) for t in verdict.tiers],
    }
    with atomic_write(what.folder / VERDICT) as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    with atomic_write(what.folder / README) as temporary:
        temporary.write_text(_readme(what, found), encoding="utf-8")
    if settings.results:
        append_row(settings.results, provenance() | _row(settings, what, found))
    return verdict


def metadata_of(header: Header) -> dict[str, object]:
    """What an ONNX file says of the student: how images become inputs, bits, accuracy, and where it comes from."""
    images = header.images
    size = images.size[-1]
    return {
        "preprocessing": {
            "mode": "RGB" if images.size[0] == 3 else "L",
            "size": size,
            "resize": math.floor(size / images.crop_pct),
            "interpolation": "bicubic" if images.interpolation == "random" else images.interpolation,
            "mean": list(images.mean or (0.0,) * images.size[0]),
            "std": list(images.std or (1.0,) * images.size[0]),
        },
        "bits": {
            name: [None if side is None else side.bits for side in (header.weight_of(name), header.input_of(name))]
            for name in header.layers
        },
        "metrics": dict(header.metrics),
        **header.origin,
    }


def _batches(settings: RunSettings, what: Shipped, model: bytes) -> tuple[list[Tensor], dict[str, Any]]:
    """Images to compare on, and the accuracies of student and runtime on all test images where these are known."""
    try:
        data = load_data(normalized(settings, what.header.images), synthesizes=False)
        check_images(what.header.images, data.info, what.file)
    except ConfigError as error:
        if (what.file.parent / CONFIG).is_file():
            raise
        log.warning("noise is compared, since the student's images are not known (%s)", error)
        seed = torch.Generator().manual_seed(0)
        noise = torch.randn(settings.export.images, *what.header.images.size, generator=seed)
        return list(noise.split(BATCH)), {"compared_on": "noise"}
    return _measured(what.student, OnnxRuntime(model, optimized=True), data.test_dataloader(), settings.export.images)


@torch.no_grad()
def _measured(
    student: nn.Module, runtime: Runtime, batches: Iterable[Batch], wanted: int
) -> tuple[list[Tensor], dict[str, Any]]:
    """The first ``wanted`` images, and the accuracies in percent of ``student`` and ``runtime`` on all ``batches``."""
    kept: list[Tensor] = []
    right, total = {"student": 0, "onnxruntime": 0}, 0
    for batch in batches:
        image, label = batch.image.float().cpu().contiguous(), batch.target.cpu()
        for name, logits in (("student", student(image)), ("onnxruntime", runtime({IMAGES: image})[LOGITS])):
            right[name] += int((logits.argmax(dim=1) == label).sum())
        if (missing := wanted - sum(map(len, kept))) > 0:
            kept += list(image[:missing].split(BATCH))
        total += len(label)
    accuracy = {name: 100 * number / total for name, number in right.items()}
    return kept, {"compared_on": "test images", "test_images": total, "top1": accuracy}


def _plain(tier: Tier) -> dict[str, Any]:
    rows = [{**dataclasses.asdict(layer), "cause": layer.cause} for layer in tier.layers.values()]
    first = None if tier.first is None else tier.first.layer
    summary = {"name": tier.name, "faults": tier.faults, "first": first, "disagreeing": tier.disagreeing}
    return summary | {"layers": rows}


def _row(settings: RunSettings, what: Shipped, found: Mapping[str, Any]) -> dict[str, object]:
    """The row of a results file; of each comparison, how many codes and predictions differ from the student's."""
    header = what.header
    weight, inputs = typical_bits(allocation_of(header))
    top1 = found.get("top1", {})
    row: dict[str, object] = {
        "experiment": header.origin.get("experiment", ""), "task": settings.task,
        "dataset": settings.data.plain["name"], **described(header), "w_bits": weight, "a_bits": inputs,
        "seed": header.origin.get("seed", ""), "top1": top1.get("onnxruntime", ""),
        "fp_top1": header.metrics.get("fp_top1"), "size_bytes": header.size_bytes,
        "file_bytes": what.file.stat().st_size, "onnx_bytes": (what.folder / MODEL).stat().st_size,
        "student_top1": top1.get("student", ""), "test_images": found.get("test_images", ""),
        "compared_images": found["images"], "passed": found["passed"],
    }  # fmt: skip
    for tier in found["tiers"][1:]:
        name = tier["name"].replace(",", "").replace(" ", "_")
        row[f"{name}_codes"] = sum(layer["differing"] for layer in tier["layers"])
        row[f"{name}_predictions"] = len(tier["disagreeing"])
    return row


def _readme(what: Shipped, found: Mapping[str, Any]) -> str:
    """The page that goes with the folder."""
    images, sizes = what.header.images, {n: (what.folder / n).stat().st_size for n in (MODEL, STUDENT)}
    lines = [
        f"# {what.header.network.options.get('name') or what.header.network.builder}",
        "",
        f"`python {PROGRAM} IMAGE...` prints the likeliest classes. It needs onnxruntime, numpy and Pillow.",
        "",
        f"- `{MODEL}`: {sizes[MODEL]} bytes, weights and inputs as integers, for ONNX Runtime.",
        f"- `{STUDENT}`: {sizes[STUDENT]} bytes, the same student packed; `qtrain.load` reads it.",
        f"- Images: {images.size[-1]} pixels square, {'color' if images.size[0] == 3 else 'gray'}; `{PROGRAM}` "
        "resizes, crops and normalizes them as the test images were.",
    ]
    if "top1" in found:
        lines += [
            f"- Accuracy on {found['test_images']} test images: {found['top1']['student']:.2f} % of the student, "
            f"{found['top1']['onnxruntime']:.2f} % of `{MODEL}` in ONNX Runtime."
        ]
    verb = "passed" if found["passed"] else "DID NOT PASS"
    lines += [
        f"- The comparison with the student, layer by layer on {found['images']} images ({found['compared_on']}), "
        f"{verb}; see `{VERDICT}`.",
        "",
    ]
    return "\n".join(lines)
