"""Students and files: saving, loading, and counting what they cost."""

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qtrain.api.arguments import check_network, hint_for
from qtrain.api.quantize import RECORD, Record
from qtrain.config.compose import compose
from qtrain.costs.count import CostReport, count
from qtrain.costs.geometry import layer_geometries
from qtrain.costs.tables import further_cost
from qtrain.models.trial import answer, logits_of, placed, tensor_of
from qtrain.nn.many_bits import in_use
from qtrain.packed.header import FileSize, Images, Network
from qtrain.packed.load import IMAGES
from qtrain.packed.networks import TIMM, Builder
from qtrain.packed.save import save_student
from qtrain.utils.atomic_write import target_of
from qtrain.utils.checks import check_writable, finite_number
from qtrain.utils.errors import errors_of
from qtrain.utils.importing import path_of

log = logging.getLogger(__name__)

THERE = ("size_bytes", "bops")
"""Costs that every config has."""


def save(
    student: nn.Module,
    path: str | Path,
    *,
    builder: Builder | None = None,
    options: Mapping[str, Any] | None = None,
    size: Sequence[int] | None = None,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    classes: Sequence[str] = (),
    metrics: Mapping[str, float] | None = None,
) -> FileSize:
    """Write ``student`` to ``path``, as long as :func:`cost` says plus a header, and return both lengths in bytes.

    The file says how the network is built: by ``builder``, a class or function or its dotted path, called with
    ``options``, plain values. It may be left out for networks of timm, and for a class that needs no arguments.
    ``size`` (C, H, W) is that of the images; a student of :func:`quantize` knows it. ``mean``, ``std`` and the names of
    the ``classes`` are for those who use the file; a student of :func:`load` knows those of its file. ``metrics`` are
    accuracies to remember.

    Before the file takes its place it is loaded once and must give the student's logits bit for bit. Raises
    ``ValueError`` in one line where it does not, and where nothing says how the network is built.

    >>> import qtrain, timm, torch
    >>> network = timm.create_model("resnet10t", num_classes=4)
    >>> student = qtrain.quantize(network, torch.rand(2, 3, 32, 32))
    >>> sizes = qtrain.save(student, "student.safetensors", classes=["cat", "dog", "bird", "fish"])
    >>> sizes.file_bytes - sizes.header_bytes == qtrain.cost(student, torch.rand(1, 3, 32, 32)).size_bytes
    True
    """
    check_network("save: student", student)
    metrics = {name: _number(f"save: metrics: {name}", one) for name, one in (metrics or {}).items()}
    mean, std = (tuple(_number(f"save: {n}", v) for v in values) for n, values in (("mean", mean), ("std", std)))
    _check_options(options or {})
    known = vars(in_use(student))
    loaded, record = known.get(IMAGES, Images(())), known.get(RECORD)
    size = size or (record.size if isinstance(record, Record) else loaded.size)
    if not size:
        raise ValueError("save: the size of the images is not known; give size=(channels, height, width)")
    images = replace(
        loaded,
        size=tuple(size),
        mean=mean or loaded.mean,
        std=std or loaded.std,
        classes=tuple(map(str, classes)) or loaded.classes,
    )
    _check_images(student, images)
    with errors_of("save: path"):
        target_of(Path(path))
    check_writable(Path(path).parent, "save: path")
    reasons: list[str] = []
    for network, builders in _networks(student, images, builder, options):
        try:
            return save_student(student, path, network=network, images=images, builders=builders, metrics=metrics)
        except (ValueError, KeyError, AttributeError) as error:
            if builder is not None:
                raise ValueError(f"save: {error}") from error
            reasons.append(str(error))
    why = f" ({reasons[-1]})" if reasons else ""
    raise ValueError(
        f"save: how a {type(in_use(student)).__name__} is built is not known{why}; give builder=... and its options"
    )


def _check_options(options: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for an option that a file cannot hold."""
    for name, value in options.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"save: options: {name} must be a number, a text, or lists and mappings of these, got {value!r}; give "
                "a builder of your own that needs no such option"
            ) from error


def _number(where: str, value: Any) -> float:
    """``value``, of whatever library, as a number of Python. Raises ``ValueError`` unless it is a finite one."""
    with errors_of(where):
        return finite_number(value.item() if getattr(value, "ndim", None) == 0 else value)


def _check_images(student: nn.Module, images: Images) -> None:
    """Raise ``ValueError`` where ``images`` are not those of ``student``.

    It must take their size and give one tensor, as long as there are names of classes; each channel has its own mean
    and deviation.
    """
    for name, numbers in (("mean", images.mean), ("std", images.std)):
        if numbers and (len(numbers) != images.size[0] or not all(map(math.isfinite, numbers))):
            raise ValueError(f"save: {name} must be a number for each of {images.size[0]} channels, got {numbers}")
    if any(deviation <= 0 for deviation in images.std):
        raise ValueError(f"save: std must be above 0 in each channel, got {images.std}")
    example = placed(torch.zeros(1, *images.size), student)
    if not images.classes:
        tensor_of(in_use(student), example, where="save: student")
    else:
        hint = f"{len(images.classes)} classes are named"
        logits_of(in_use(student), example, where="save: student", classes=len(images.classes), hint=hint)


def cost(student: nn.Module, images: Tensor, *, metrics: Sequence[str] = (), options: Sequence[str] = ()) -> CostReport:
    """Bytes, multiplications and bit operations of ``student``, quantized or not, layer by layer; printable.

    ``images`` (N, C, H, W) give the size; arithmetic is that of one image. Of a student of many bits it is the cost of
    the width in use, as if it were alone. ``metrics`` adds others, by their names in ``conf/cost``: ``energy``,
    ``area``, ``olaccel``, ``latency`` and so on; ``report.metrics["energy"]`` has the total and each layer's part.
    ``options`` are what a command would add, such as ``allocate.costs.latency.table=FILE``. Raises
    :class:`~qtrain.utils.errors.ConfigError`, a ``ValueError``, for a metric that there is not, and for whatever one
    refuses; and ``ValueError`` for images that the network does not take.

    >>> import torch, qtrain
    >>> network, images = torch.nn.Sequential(torch.nn.Linear(4, 2)), torch.rand(1, 4)
    >>> qtrain.cost(network, images).size_bytes
    40
    >>> energy = qtrain.cost(network, images, metrics=["energy"]).metrics["energy"]
    >>> f"{1000 * energy.total:.1f} nJ"
    '6.9 nJ'
    """
    check_network("cost: student", student)
    if not isinstance(images, Tensor):
        raise ValueError(f"cost: images must be a tensor (N, C, H, W), got {type(images).__name__}")
    if not len(images):
        raise ValueError("cost: images must be at least one, got none")
    model, example = in_use(student), placed(images[:1], student)
    answer(model, example, where="cost", hint=hint_for(example.shape))
    report = count(model, example)
    if not metrics:
        return report
    named = [f"{'' if name in THERE else '+'}cost@allocate.costs.{name}={name}" for name in dict.fromkeys(metrics)]
    costs, geometries = compose([*named, *options]).allocate.costs, layer_geometries(model, example)
    built = {name: one.build() for name in metrics if (one := costs[name]) is not None}
    return replace(report, metrics={n: further_cost(one, model, report, geometries) for n, one in built.items()})


def _networks(
    student: nn.Module, images: Images, builder: Builder | None, options: Mapping[str, Any] | None
) -> Iterator[tuple[Network, list[Builder]]]:
    """The ways in which ``student`` may have been built."""
    given = dict(options or {})
    if builder is not None:
        path = builder if isinstance(builder, str) else path_of(builder, importable=False)
        if "<" in path:
            log.warning("save: %s has no name to import it by, so only this program can load the file", path)
        yield Network(path, given), [builder]
        return
    student = in_use(student)
    architecture = (getattr(student, "pretrained_cfg", None) or {}).get("architecture")
    if architecture is not None:
        channels, height, *_ = images.size
        known = {"name": architecture, "num_classes": getattr(student, "num_classes", 0), "in_channels": channels}
        yield Network(TIMM, {**known, "image_size": height, **given}), []
    yield Network(path_of(type(student), importable=False), given), [type(student)]
