"""The likeliest classes of images without labels, by a student from its file."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from qtrain.data.file_loader import FileBatch, file_batches
from qtrain.data.image_files import find_images
from qtrain.data.image_set import UnreadableImageError
from qtrain.models.transforms import create_transform
from qtrain.packed.header import Header, Images, Structure, dtype_of
from qtrain.pipeline.prediction_file import Prediction, checked_output, is_terminal, writing
from qtrain.pipeline.results import cpu_cores
from qtrain.pipeline.student_file import check_square, load_trained, student_at
from qtrain.settings.run_settings import RunSettings
from qtrain.utils.atomic_write import partial_of
from qtrain.utils.checks import check_range
from qtrain.utils.errors import ConfigError, IncompleteError, as_config_error
from qtrain.utils.progress import tracked

log = logging.getLogger(__name__)

MOST_WORKERS = 8


def predict(settings: RunSettings) -> dict[str, int]:
    """Write the likeliest classes of ``settings.images`` by the student in ``settings.checkpoint``, image by image.

    Images are decoded, resized and normalized as the student's test images were. One that cannot be decoded is logged
    and left out. Returns how many images were ``predicted`` and ``skipped``. Raises ``ConfigError`` where something is
    wrong before the first image, and ``IncompleteError`` when interrupted; what was written until then stays.
    """
    how = settings.predict
    with as_config_error("predict"):
        check_range("predict", "[1, inf)", top_k=how.top_k, batch_size=how.batch_size)
        check_range("predict", "[0, inf)", workers=how.workers)
    output = checked_output(how.output, overwrite=settings.overwrite)
    if settings.checkpoint is None:
        raise ConfigError("model: task=predict needs a student; give model=FILE, the student.safetensors of a run")
    if not settings.images:
        raise ConfigError("images: task=predict needs images; give images=FOLDER, a file, a pattern or a list of these")
    header, student = load_trained(settings, student_at(settings.checkpoint, key="model"), key="model")
    transform = transform_of(header.images)
    classes = class_names(header, student)
    with as_config_error("images"):
        files = find_images(settings.images)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    workers = min(MOST_WORKERS, cpu_cores()) if how.workers is None else how.workers
    batches = file_batches(
        files, transform, batch_size=how.batch_size, workers=workers, pin_memory=device.type == "cuda"
    )
    rows = predictions(student, batches, classes, header.structure, top_k=how.top_k, device=device)
    return _write(rows, output, images=len(files), top_k=min(how.top_k, len(classes)))


def _write(
    rows: Iterable[Prediction | UnreadableImageError], output: Path | None, *, images: int, top_k: int
) -> dict[str, int]:
    bar = False if output is None and is_terminal() else None  # the rows themselves show how far it is
    predicted = skipped = 0
    try:
        with writing(output, top_k=top_k) as write:
            for row in tracked(rows, total=images, title="predict", unit="images", bar=bar):
                if isinstance(row, Prediction):
                    write(row)
                    predicted += 1
                else:
                    log.warning("skipped %s: %s", row.where, row.reason)
                    skipped += 1
    except KeyboardInterrupt as error:
        kept = f"; those before are in {partial_of(output)}" if output else ""
        done = f"interrupted after {predicted + skipped} of {images} images{kept}"
        raise IncompleteError(done, exit_code=130) from error
    return {"predicted": predicted, "skipped": skipped}


@torch.no_grad()
def predictions(
    student: nn.Module,
    batches: Iterable[FileBatch],
    classes: Sequence[str | int],
    structure: Structure,
    *,
    top_k: int,
    device: torch.device,
) -> Iterator[Prediction | UnreadableImageError]:
    """The ``top_k`` likeliest of ``classes`` for each image of ``batches``, or why it cannot be read.

    The probabilities are the softmax of the logits of ``student``, which moves to ``device``; ``structure`` says what
    images it takes. Raises ``ValueError`` where logits are not finite.
    """
    student.to(device)
    for batch in batches:
        yield from batch.unreadable
        if not batch.paths:
            continue
        probabilities = student(_as_taken(batch.image, structure, device)).float().softmax(dim=1)
        values, numbers = probabilities.topk(min(top_k, len(classes)), dim=1)
        for path, best, names in zip(batch.paths, values.tolist(), numbers.tolist(), strict=True):
            if math.isnan(best[0]):
                raise ValueError(f"{path}: the student's logits are not finite; train it again, or with more bits")
            yield Prediction(path, tuple((classes[n], value) for n, value in zip(names, best, strict=True)))


def transform_of(images: Images) -> Callable[[Image.Image], Tensor]:
    """What makes a decoded image of any size one that the student takes, as for its test images.

    Raises ``ConfigError`` for a student that takes other images than square ones, gray or in color.
    """
    check_square(images, "model", task="predict")
    channels, height, _ = images.size
    if not images.mean:
        log.info("the student's file names no mean and std: pixels are scaled to [0, 1]")
    return create_transform(
        image_size=height,
        train=False,
        mean=images.mean or (0.0,) * channels,
        std=images.std or (1.0,) * channels,
        interpolation=images.interpolation,
        crop_pct=images.crop_pct,
    )


@torch.no_grad()
def class_names(header: Header, student: nn.Module) -> Sequence[str | int]:
    """The names of the student's outputs, or their numbers from 0 where its file has no names.

    Raises ``ConfigError`` for a student whose outputs are no logits (N, K), or not as many as its classes.
    """
    logits = student(_as_taken(torch.zeros(1, *header.images.size), header.structure, torch.device("cpu")))
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        found = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ConfigError(f"model: the student gives {found}; to predict classes it must give logits (N, K)")
    names = header.images.classes
    if names and len(names) != logits.shape[1]:
        raise ConfigError(f"model: the student has {logits.shape[1]} outputs, its file names {len(names)} classes")
    return names or range(logits.shape[1])


def _as_taken(image: Tensor, structure: Structure, device: torch.device) -> Tensor:
    """``image`` (N, C, H, W) on ``device``, in the type of numbers and the memory format of the student."""
    dtype = torch.float32 if structure.dtype is None else dtype_of(structure.dtype)
    layout = torch.channels_last if structure.channels_last else torch.contiguous_format
    return image.to(device, dtype, non_blocking=True, memory_format=layout)
