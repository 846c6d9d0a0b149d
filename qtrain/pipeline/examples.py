"""Some test images as pictures, and what the models of a run say of them: for the report, and to try an export on."""

import base64
import io
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from qtrain.data.base import VisionData
from qtrain.data.order import BatchOrder
from qtrain.settings.run_files import EXAMPLES
from qtrain.spec import Batch, DataInfo
from qtrain.utils.atomic_write import atomic_write, write_text
from qtrain.utils.eval_mode import evaluating

COUNT = 200
"""So many test images, the first ones, are kept with the answers."""
LARGEST = 48
"""Pixels of the longer side of a kept picture; larger images are reduced."""


class Picture(NamedTuple):
    """A test image as a user would have it, and the name of its class."""

    image: Image.Image
    label: str


def pictures(data: VisionData, count: int) -> Iterator[Picture]:
    """The first ``count`` test images."""
    for batch in _first(data, count):
        for image, label in zip(batch.image, batch.target.tolist(), strict=True):
            yield Picture(as_picture(image, data.info), class_name(data.info, label))


def as_picture(image: Tensor, info: DataInfo) -> Image.Image:
    """A normalized ``image`` (C, H, W), with 1 or 3 channels, as 8-bit pixels again."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (info.mean, info.std))
    pixels = ((image.cpu() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def class_name(info: DataInfo, number: int) -> str:
    """The name of class ``number``, or the number where classes have no names."""
    return info.classes[number] if info.classes else str(number)


@torch.no_grad()
def keep_examples(folder: Path, data: VisionData, models: Mapping[str, nn.Module], device: torch.device) -> None:
    """Write the first test images, and what each of ``models`` says of them, to a run's ``folder``.

    Nothing is written where there are no test images, or images that are neither gray nor in color.
    """
    if not data.info.test_size or data.info.in_channels not in (1, 3):
        return
    images: list[str] = []
    labels: list[int] = []
    answers: dict[str, list[int]] = {name: [] for name in models}
    for batch in _first(data, COUNT):
        images += [_encoded(as_picture(image, data.info)) for image in batch.image]
        labels += batch.target.tolist()
        for name, model in models.items():
            model.to(device)
            with evaluating(model):
                answers[name] += model(batch.image.to(device)).argmax(dim=1).tolist()
    named = {name: [class_name(data.info, number) for number in numbers] for name, numbers in answers.items()}
    content = {"images": images, "labels": [class_name(data.info, n) for n in labels], "answers": named}
    write_text(folder / EXAMPLES, json.dumps(content) + "\n")


def write_pictures(data: VisionData, folder: Path, count: int = 3) -> list[Path]:
    """The first ``count`` test images as PNG files in ``folder``, whose names tell their classes."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number, picture in enumerate(pictures(data, count)):
        files.append(folder / f"{number}-label-{re.sub(r'[^A-Za-z0-9]+', '_', picture.label)}.png")
        with atomic_write(files[-1]) as temporary:
            picture.image.save(temporary, format="PNG")
    return files


def _first(data: VisionData, count: int) -> Iterator[Batch]:
    samples = torch.arange(min(count, data.info.test_size))
    order = BatchOrder(samples, seed=0, batch_size=data.eval_batch_size, train=False)
    yield from data.test_loader(order) if len(samples) else ()


def _encoded(image: Image.Image) -> str:
    """A PNG in base64."""
    image.thumbnail((LARGEST, LARGEST))
    content = io.BytesIO()
    image.save(content, format="PNG")
    return base64.b64encode(content.getvalue()).decode()
