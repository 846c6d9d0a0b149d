"""The files of a student: packed, as it is deployed, and in floating point, as it may be trained further."""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from pytorch_lightning.utilities import rank_zero_only
from safetensors.torch import save_file
from torch import nn

from qtrain.nn.many_bits import ManyBits, in_use
from qtrain.packed.header import Header, Images, read
from qtrain.packed.load import load_student
from qtrain.packed.save import save_student
from qtrain.pipeline.build_model import builder_of, network_of
from qtrain.pipeline.results import provenance
from qtrain.settings.component import called_after
from qtrain.settings.run_files import LATENT, STUDENT
from qtrain.settings.run_settings import RunSettings
from qtrain.spec import FULL_PRECISION, Allocation, DataInfo, LayerBits
from qtrain.utils.atomic_write import atomic_write
from qtrain.utils.errors import ConfigError
from qtrain.utils.importing import NotAdmittedError
from qtrain.utils.sharing import distinct

log = logging.getLogger(__name__)

METRICS = ("top1", "fp_top1", "ptq_top1")
"""Fields of a summary that a student's file repeats."""


def write_student(
    settings: RunSettings, folder: Path, student: nn.Module, info: DataInfo, summary: Mapping[str, object]
) -> dict[str, object]:
    """Write ``student`` to ``folder``, packed and in floating point; ``file_bytes`` and ``header_bytes`` of the former.

    The packed file holds the accuracies of ``summary`` and where it comes from, but no date: equal students have equal
    files. Where the network cannot be built again, the packed file is left out, and the log says why.
    """
    save_latent(student, folder / LATENT)
    network = network_of(settings.model, info)
    made = provenance()
    widths = summary.get("widths") or {}
    assert isinstance(widths, Mapping)
    accuracies = dict(summary) | {f"{name}/{w}": found.get(name) for w, found in widths.items() for name in METRICS}
    metrics = {name: v for name, v in accuracies.items() if name.split("/")[0] in METRICS and isinstance(v, float)}
    origin = {"config_hash": settings.identity, "experiment": settings.experiment or "", "seed": str(settings.seed)}
    if settings.target is not None:
        origin["target"] = str(settings.target.get("name"))
    try:
        size = save_student(
            student,
            folder / STUDENT,
            network=network,
            images=images_of(info),
            builders=[network.builder],
            metrics={**metrics, "test_images": info.test_size},
            origin=origin | {name: made[name] for name in ("commit", "torch", "timm", "python")},
        )
    except ValueError as error:  # nothing that was trained is lost for it
        log.error("no %s is written: %s; the student's weights are in %s", STUDENT, error, LATENT)
        return {}
    return {"file_bytes": size.file_bytes, "header_bytes": size.header_bytes}


def student_at(place: str, *, key: str = "checkpoint") -> Path:
    """The file at ``place``, the value of ``key``: a student's, or the folder of the run that left one.

    Raises ``ConfigError`` where there is none.
    """
    path = Path(place).expanduser()
    file = path / STUDENT if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(
            f"{key}: there is no file {file}; give a student.safetensors, or the folder of a finished run, for "
            "instance outputs/quickstart/w4a4-distill"
        )
    return file


def load_trained(settings: RunSettings, file: Path, *, key: str = "checkpoint") -> tuple[Header, nn.Module]:
    """The student in ``file`` and what the file says of it; code of one's own runs where ``settings.model`` names it.

    Of a file of many bits they are the student and the header of ``settings.bits`` bits, or of the most. Raises
    ``ConfigError``, with ``key`` in front, where the file cannot be loaded.
    """
    try:
        header, _ = read(file)
        student = load_student(file, bits=settings.bits, builders=[builder_of(settings.model), *settings.allow_targets])
        if isinstance(student, ManyBits):
            return header.at(student.bits), in_use(student)
        return header, student
    except (ValueError, OSError) as error:
        if isinstance(refused := error.__cause__, NotAdmittedError):
            raise ConfigError(
                f"{key}: {file} names code that is not qtrain's, {refused.path}; if you trust it, add on the "
                f"command line allow_targets=[{refused.path}]"
            ) from error
        raise ConfigError(f"{key}: {error}") from error


def width_in_use(settings: RunSettings, file: Path) -> int | None:
    """The width that :func:`load_trained` takes of a file of many bits; ``None`` of one of one width."""
    widths = read(file)[0].widths
    return (settings.bits or widths[0]) if widths else None


def check_images(images: Images, info: DataInfo, file: Path) -> None:
    """Raise ``ConfigError`` where ``info`` has other channels or classes than the student in ``file`` takes."""
    classes = len(images.classes)
    if images.size[0] != info.in_channels or (classes and classes != info.num_classes):
        raise ConfigError(
            f"checkpoint: {file} is for images of {images.size[0]} channels and {classes} classes, {info.name} has "
            f"{info.in_channels} and {info.num_classes}; name the student's own with data=..."
        )


def check_square(images: Images, key: str, *, task: str) -> None:
    """Raise ``ConfigError`` unless the student of ``key`` takes square images, gray or in color."""
    channels, height, width = images.size
    if channels not in (1, 3) or height != width:
        raise ConfigError(
            f"{key}: the student takes images of {channels}x{height}x{width}; task={task} serves those that take "
            "square images, gray (1 channel) or in color (3)"
        )


def allocation_of(header: Header) -> Allocation:
    """The bits of each quantized layer of a student."""
    shared = header.structure.shared_inputs
    sides = {name: (header.weight_of(name), header.input_of(shared.get(name, name))) for name in header.layers}
    return {
        name: LayerBits(*(FULL_PRECISION if side is None else side.bits for side in both))
        for name, both in sides.items()
    }


def described(header: Header) -> dict[str, object]:
    """What a summary says of a student, from its file: model and quantizer."""
    methods = [kind.quantizer for kind in header.weights] + [kind.quantizer for kind in header.inputs]
    network = header.network
    name = network.options.get("name") or called_after(network.builder)
    return {"model": name, "quantizer": "/".join(dict.fromkeys(map(str.lower, methods))) or None}


def images_of(info: DataInfo) -> Images:
    """What a network for these data takes."""
    return Images(
        size=(info.in_channels, info.image_size, info.image_size),
        mean=tuple(info.mean),
        std=tuple(info.std),
        classes=tuple(info.classes),
        crop_pct=info.crop_pct,
        interpolation=info.interpolation,
    )


def save_latent(student: nn.Module, path: Path) -> None:
    """The state dict of ``student``, as torch saves it; ``path`` appears when all of it is written."""
    state = {name: tensor.detach().cpu() for name, tensor in student.state_dict().items()}
    with atomic_write(path) as temporary:
        torch.save(state, temporary)


@rank_zero_only
def save_weights(model: nn.Module, path: Path, *, metadata: dict[str, str] | None = None) -> None:
    """The state dict of the unconverted ``model`` as safetensors, a tensor with several names once.

    ``path`` appears when all of it is written.
    """
    tensors = {name: tensor.cpu().contiguous() for name, tensor in distinct(model.state_dict()).items()}
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata)
