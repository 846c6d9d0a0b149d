"""Exports and their proof, for a student at hand."""

import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qtrain.api.arguments import Images, check_network, images_and_labels
from qtrain.api.files import save
from qtrain.api.quantize import RECORD, Record, record_of
from qtrain.deployment.onnx.symbolic import OPSET
from qtrain.deployment.onnx.write import export as as_onnx
from qtrain.deployment.parity.file import image_size, read
from qtrain.deployment.parity.runtimes import chosen
from qtrain.deployment.parity.verdict import Verdict
from qtrain.models.trial import answer, tensor_of
from qtrain.nn.many_bits import in_use
from qtrain.packed import header
from qtrain.packed.networks import Builder
from qtrain.pipeline.export_folder import BATCH, Given, Shipped, check_files, compared_with, weights_packed, write_files
from qtrain.settings.run_files import STUDENT
from qtrain.utils.atomic_write import atomic_write
from qtrain.utils.checks import check_range, check_writable
from qtrain.utils.copies import copied

log = logging.getLogger(__name__)


def export(
    student: nn.Module,
    path: str | Path,
    images: Images,
    *,
    builder: Builder | None = None,
    options: Mapping[str, Any] | None = None,
    size: Sequence[int] | None = None,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    classes: Sequence[str] = (),
    compared: int = 200,
    opset: int = OPSET,
    batch: int | None = None,
    weights: str = "bytes",
    runtimes: Sequence[str] | None = ("onnxruntime",),
) -> Verdict:
    """Write ``student`` as ONNX to ``path``, and compare the file with it; the verdict, which prints in a few lines.

    ``path`` is a folder, which gets what ``task=export`` writes, or a file ``.onnx``. ``images`` are a tensor (N, C, H,
    W), or batches of images or of (images, labels), normalized as in training; the first ``compared`` are compared
    layer by layer, and with labels the accuracy is taken on all. ``builder``, ``options``, ``size``, ``mean``, ``std``
    and ``classes`` are those of :func:`qtrain.save`. The file is for ``batch`` images at a time, or any number.
    ``weights="packed"`` stores those of at most 4 bits in half a byte each. ``runtimes`` are ``onnxruntime`` and
    ``openvino``; ``None`` are those that are installed.

    Of a student of many bits the width in use is exported. An export that does not compute what was trained is an error
    in the log, and its verdict has not ``passed``. Raises ``ValueError`` in one line where the student has no form in
    ONNX, or a runtime is not installed.

    >>> import torch, qtrain
    >>> network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(),
    ...                               torch.nn.Linear(4 * 36, 10))
    >>> student = qtrain.quantize(network, torch.rand(16, 3, 8, 8))
    >>> verdict = qtrain.export(student, "student.onnx", torch.rand(16, 3, 8, 8))
    >>> verdict.passed
    True
    """
    check_network("export: student", student)
    path, runtimes, packed = Path(path), chosen(runtimes), weights_packed(weights)
    check_writable(path.parent if path.suffix == ".onnx" else path, "export: path")
    original, student = student, _on_the_cpu(student)
    if size is None and not isinstance(vars(student).get(RECORD), Record):  # a student that was loaded
        images, size = _with_size(images)
    sizes = tuple(size or record_of(student).size)
    _check_copy(original, student, sizes)
    images = _looked_at(images, sizes, student)
    if path.suffix == ".onnx":
        made = as_onnx(student, sizes, opset=opset, batch=batch, packed=packed).to_bytes()
        with atomic_write(path) as temporary:
            temporary.write_bytes(made)
    else:
        with tempfile.TemporaryDirectory(dir=path) as aside:  # until it is known that all can be written
            file = Path(aside, STUDENT)
            save(student, file, builder=builder, options=options, size=size, mean=mean, std=std, classes=classes)
            write_files(_shipped(student, path, file), opset=opset, batch=batch, weights=weights)
    return verify(student, path, images, compared=compared, runtimes=runtimes)


def verify(
    student: nn.Module,
    path: str | Path,
    images: Images,
    *,
    compared: int = 200,
    runtimes: Sequence[str] | None = ("onnxruntime",),
) -> Verdict:
    """Compare the export at ``path``, a folder or a file ``.onnx``, with ``student``; as :func:`export` does.

    Raises ``ValueError`` in one line for a file that is damaged, and ``FileNotFoundError`` where there is none.

    >>> import torch, qtrain
    >>> images = torch.rand(8, 1, 8, 8)
    >>> student = qtrain.quantize(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4)), images)
    >>> qtrain.export(student, "digits.onnx", images).passed
    True
    >>> qtrain.verify(student, "digits.onnx", images).passed
    True
    """
    check_network("verify: student", student)
    check_range("verify", "[1, inf)", compared=compared)
    path, original, student = Path(path), student, _on_the_cpu(student)
    if path.suffix == ".onnx":
        file = path.read_bytes()
        size = image_size(read(file))
        _check_copy(original, student, size)
        verdict = compared_with(student, file, size, Given(_pairs(images, size), compared, "images"), runtimes)
    else:
        shipped = _shipped(student, path)
        _check_copy(original, student, shipped.header.images.size)
        given = Given(_pairs(images, shipped.header.images.size), compared, "images")
        verdict, _ = check_files(shipped, given, runtimes)
    for fault in verdict.faults:
        log.error("%s does not compute what was trained: %s", path, fault)
    return verdict


def _on_the_cpu(student: nn.Module) -> nn.Module:
    """A copy of what ``student`` computes with now, in eval mode and in 32 bits, as a file has it."""
    return copied(in_use(student)).cpu().float().eval()


def _check_copy(student: nn.Module, made: nn.Module, size: Sequence[int]) -> None:
    """Raise ``ValueError`` where ``made``, a copy of ``student``, computes something else on an image of ``size``.

    One on another device or of other numbers is not compared: it rounds differently.
    """
    if any(p.device.type != "cpu" or p.dtype != torch.float32 for p in student.parameters()):
        return
    noise = torch.rand(1, *size, generator=torch.Generator().manual_seed(0))
    try:
        own, other = (tree_leaves(answer(one, noise, where="verify")) for one in (in_use(student), made))
    except ValueError:  # whoever goes on with it says so
        return
    pairs = [(a, b) for a, b in zip(own, other, strict=True) if isinstance(a, Tensor)]
    if not all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs):
        raise ValueError(f"verify: a copy of the {type(student).__name__} computes something else than the network")


def _shipped(student: nn.Module, folder: Path, file: Path | None = None) -> Shipped:
    """``student``, the ``folder`` of its export, and its ``file``, that in the folder unless another is given.

    Raises ``ValueError`` unless its images are square.
    """
    file = file or folder / STUDENT
    found, _ = header.read(file)
    channels, *sides = found.images.size
    if channels not in (1, 3) or len(set(sides)) != 1 or len(sides) != 2:
        raise ValueError(
            f"export: a folder is for a student of square images, gray or in color, got {found.images.size}; give a "
            "path that ends with .onnx, for the file alone"
        )
    return Shipped(found, student, file, folder)


def _with_size(images: Images) -> tuple[Images, tuple[int, ...]]:
    """``images``, and the size (C, H, W) of the first."""
    if isinstance(images, Tensor):
        return images, tuple(images.shape[1:])
    first, images = _first_of(images)
    batch, _ = images_and_labels("export", first)
    return images, tuple(batch.shape[1:])


def _looked_at(images: Images, size: Sequence[int], student: nn.Module) -> Images:
    """``images``, of whose first batch it is known that it fits, before a file is written.

    Raises ``ValueError`` where there is none, its images are not of ``size``, or its labels number no class.
    """
    first, images = (images[:1], images) if isinstance(images, Tensor) else _first_of(images)
    some, labels = next(_pairs([] if first is None else [first], size), (torch.zeros(0), None))
    if not len(some):
        raise ValueError("export: images: there are none to compare with; give at least one")
    classes = tensor_of(student, torch.zeros(1, *size), where="export").shape[-1]
    if labels is not None and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"export: images: labels from {int(labels.min())} to {int(labels.max())}, and the student has {classes} "
            f"classes, 0 to {classes - 1}"
        )
    return images


def _first_of(batches: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    """The first of ``batches``, ``None`` where there is none, and all of them."""
    iterator = iter(batches)
    first = next(iterator, None)
    return first, chain([first], iterator) if iterator is batches and first is not None else batches


def _pairs(images: Images, size: Sequence[int]) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The batches. Raises ``ValueError`` for images that the file, which is for those of ``size``, does not take."""
    batches: Iterable[Any] = images.split(BATCH) if isinstance(images, Tensor) else images
    for batch in batches:
        some, labels = images_and_labels("verify", batch)
        if tuple(some.shape[1:]) != tuple(size):
            expected = ", ".join(map(str, size))
            raise ValueError(f"verify: images must have the shape (N, {expected}), got {tuple(some.shape)}")
        yield some, labels
