"""A student as a folder that runs elsewhere: the ONNX file, proved equal to the student, and a program that uses it."""

import dataclasses
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qtrain.deployment.onnx.write import IMAGES, LOGITS, export
from qtrain.deployment.parity.file import batch_of, read
from qtrain.deployment.parity.runtimes import RUNTIME_NAMES, RUNTIMES, Runtime, chosen, of_any_length
from qtrain.deployment.parity.verdict import Tier, Verdict
from qtrain.deployment.parity.verify import REFERENCE, verify
from qtrain.functional.layout import plain
from qtrain.packed.header import Header
from qtrain.pipeline.predict import class_names
from qtrain.settings.run_files import SPEED, STUDENT, VERDICT
from qtrain.utils.atomic_write import atomic_write
from qtrain.utils.checks import check_writable
from qtrain.utils.digest import file_digest
from qtrain.utils.errors import one_line

log = logging.getLogger(__name__)

MODEL, LABELS, PROGRAM, README = "model.onnx", "labels.json", "run.py", "README.md"
"""Files of the folder, beside the student's own."""

BATCH = 50
"""Images that are predicted at a time."""


@dataclass(frozen=True)
class Shipped:
    """What a student's file, its folder and the images to compare on are.

    ``alone`` is the content of the file of this width alone, where ``file`` has many bits.
    """

    header: Header
    student: nn.Module
    file: Path
    folder: Path
    alone: bytes | None = None


@dataclass(frozen=True)
class Given:
    """What student and export are compared on: (images, labels or ``None``), of which ``wanted`` layer by layer.

    ``kind`` says in words what they are.
    """

    batches: Iterable[tuple[Tensor, Tensor | None]]
    wanted: int
    kind: str


def write_files(what: Shipped, *, opset: int, batch: int | None = None, weights: str = "bytes") -> None:
    """Write the export of ``what`` to its folder, for ``batch`` images at a time or any number.

    Raises ``ValueError`` where the student has no form in ONNX, before anything is written.
    """
    packed, metadata = weights_packed(weights), metadata_of(what.header)
    made = export(what.student, what.header.images.size, opset=opset, batch=batch, packed=packed, metadata=metadata)
    for layer, note in made.lowering.notes.items():
        log.warning("%s: %s", layer, note)
    files = {
        MODEL: made.to_bytes(),
        STUDENT: what.file.read_bytes() if what.alone is None else what.alone,
        LABELS: json.dumps([str(name) for name in class_names(what.header, what.student)], indent=1).encode(),
        PROGRAM: (Path(__file__).parent.parent / "deployment" / "onnx" / "run.py").read_bytes(),
    }
    check_writable(what.folder, "export.output")
    _check_own(what.folder)
    if not ((there := what.folder / MODEL).is_file() and there.read_bytes() == files[MODEL]):
        for name in (SPEED, VERDICT, README):  # of another file
            (what.folder / name).unlink(missing_ok=True)
    for name, content in files.items():
        with atomic_write(what.folder / name) as temporary:
            temporary.write_bytes(content)


def _check_own(folder: Path) -> None:
    """Raise ``ValueError`` where something else has written a file into ``folder`` that an export would replace."""
    if (folder / MODEL).exists():
        return
    for name in (LABELS, PROGRAM, README):
        if (folder / name).exists():
            raise ValueError(f"export: {folder} has a {name} that no export has written; give a folder of its own")


def weights_packed(weights: str) -> bool:
    """Whether ``weights`` asks for half a byte for each of at most 4 bits. Raises ``ValueError`` for what is no way."""
    if weights not in ("bytes", "packed"):
        raise ValueError(f"weights: must be bytes or packed, got {weights}")
    return weights == "packed"


def check_files(what: Shipped, given: Given, runtimes: Sequence[str] | None) -> tuple[Verdict, dict[str, Any]]:
    """Compare the ONNX file in the folder of ``what`` with the student, and write what came out beside it.

    Returns the verdict, and the content of ``verify.json``. Raises ``ValueError`` where the file is damaged or absent,
    or a runtime of ``runtimes`` is not installed.
    """
    file = (what.folder / MODEL).read_bytes()
    verdict = compared_with(what.student, file, what.header.images.size, given, runtimes)
    accuracy = {"test_images": verdict.test_images, "top1": verdict.top1} if verdict.top1 else {}
    found = {
        "passed": verdict.passed,
        "student": file_digest(what.file),
        "images": verdict.images,
        "compared_on": given.kind,
        **accuracy,
        "tiers": [_plain(tier) for tier in verdict.tiers],
    }
    with atomic_write(what.folder / VERDICT) as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    write_readme(what)
    return verdict, found


def write_speed(what: Shipped, measured: Mapping[str, Any]) -> None:
    """Write what ``task=benchmark`` ``measured`` to the folder of ``what``, and name the time in its README.

    ``measured`` has the ``hardware``, and ``rows`` of columns, the first of them for one image at a time.
    """
    with atomic_write(what.folder / SPEED) as temporary:
        temporary.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    write_readme(what)


def write_readme(what: Shipped) -> None:
    """Write the page of the folder, from the files in it."""
    found, speed = (_content(what.folder / name) for name in (VERDICT, SPEED))
    with atomic_write(what.folder / README) as temporary:
        temporary.write_text(_readme(what, found, speed), encoding="utf-8")


def _content(file: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one where there is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


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


@torch.no_grad()
def compared_with(
    student: nn.Module, file: bytes, size: tuple[int, ...], given: Given, runtimes: Sequence[str] | None
) -> Verdict:
    """Compare ``file``, for images of ``size`` (C, H, W), with ``student`` in ``runtimes``, on what is ``given``."""
    runtimes, batch = chosen(runtimes), batch_of(read(file))
    networks: dict[str, Runtime] = {"student": lambda inputs: {LOGITS: student(inputs[IMAGES])}}
    for name in runtimes:
        try:
            networks[name] = of_any_length(RUNTIMES[name](file), batch)
        except Exception as error:  # whatever a runtime does with a file; the gate says it too
            log.warning("%s does not run the file: %s", name, one_line(error))
    kept: list[Tensor] = []
    kept_labels: list[int] = []
    right, total = dict.fromkeys(networks, 0), 0
    for images, labels in given.batches:
        images = plain(images)
        if (missing := given.wanted - sum(map(len, kept))) > 0:
            kept += list(images[:missing].split(BATCH))
            kept_labels += [] if labels is None else labels[:missing].tolist()
        elif labels is None:
            break
        if labels is not None:
            total += len(labels)
            for name, network in networks.items():
                for some, truth in zip(images.split(BATCH), labels.cpu().split(BATCH), strict=True):
                    right[name] += int((network({IMAGES: some})[LOGITS].argmax(dim=1) == truth).sum())
    verdict = verify(student, kept, size, file, runtimes=runtimes)
    verdict.test_images = total
    verdict.top1 = {name: 100 * number / total for name, number in right.items()} if total else {}
    predicted = next(tier.predicted for tier in verdict.tiers if tier.name == REFERENCE)
    if total and len(predicted) == total:  # all were compared
        same = sum(one == label for one, label in zip(predicted, kept_labels, strict=True))
        verdict.top1[REFERENCE] = 100 * same / total
    return verdict


def _plain(tier: Tier) -> dict[str, Any]:
    rows = [{**dataclasses.asdict(layer), "cause": layer.cause} for layer in tier.layers.values()]
    first = None if tier.first is None else tier.first.layer
    disagreeing = [dataclasses.asdict(one) for one in tier.disagreeing]
    summary = {"name": tier.name, "faults": tier.faults, "first": first, "disagreeing": disagreeing}
    return summary | {"notes": tier.notes, "layers": rows}


def _readme(what: Shipped, found: Mapping[str, Any], speed: Mapping[str, Any]) -> str:
    """The page that goes with the folder: what was ``found`` in the comparison, and the ``speed`` where it is known."""
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
        top1 = dict(found["top1"])
        parts = [f"{top1.pop('student'):.2f} % of the student"]
        ways = {name: f"of `{MODEL}` in {said}" for name, said in RUNTIME_NAMES.items()}
        ways[REFERENCE] = "computed with integers only"
        parts += [f"{number:.2f} % {ways[name]}" for name, number in top1.items()]
        lines += [f"- Accuracy on {found['test_images']} {found['compared_on']}: {', '.join(parts)}."]
    if speed:
        one, threads = speed["rows"][0], speed["rows"][0]["threads"]
        lines.append(
            f"- Time of one image in ONNX Runtime: {one['ms']:.2f} ms ({one['ms_low']:.2f} to {one['ms_high']:.2f}), "
            f"{one['of_fp']:.2f} of full precision's, with {threads} thread{'s' * (threads > 1)} on "
            f"{speed['hardware']}; see `{SPEED}`."
        )
    if found:
        verb = "passed" if found["passed"] else "DID NOT PASS"
        lines.append(
            f"- The comparison with the student, layer by layer on {found['images']} images ({found['compared_on']}), "
            f"{verb}; see `{VERDICT}`."
        )
    return "\n".join([*lines, ""])
