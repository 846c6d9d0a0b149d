"""The exported student's time and size beside those of full precision, and of the runtime's own quantization of it."""

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qtrain.data.base import VisionData
from qtrain.deployment.benchmark.integers import InIntegers, in_integers
from qtrain.deployment.benchmark.rivals import EXPORT, FULL_PRECISION, RUNTIME_INT8, predicted, rivals, timed
from qtrain.deployment.benchmark.timing import Spread, Times, ratio
from qtrain.deployment.parity.file import batch_of, read
from qtrain.functional.layout import plain
from qtrain.packed.networks import build_network
from qtrain.pipeline.build_model import build_model, network_of
from qtrain.pipeline.evaluate import normalized
from qtrain.pipeline.export_folder import MODEL, Shipped, write_speed
from qtrain.pipeline.export_run import shipped
from qtrain.pipeline.load_data import load_data
from qtrain.pipeline.pretrain import full_precision_weights, must_train
from qtrain.pipeline.results import append_row, check_results, hardware, provenance
from qtrain.pipeline.run_folder import typical_bits
from qtrain.pipeline.student_file import allocation_of, check_images, described
from qtrain.settings.run_settings import RunSettings
from qtrain.utils.errors import ConfigError, as_config_error
from qtrain.utils.processor import processor_flags

log = logging.getLogger(__name__)

FLAGS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")
"""Instructions, as Linux calls them, on which the speed of integers depends: on x86, those with ``vnni`` or ``amx`` add
four products of bytes in one step, and so do the last two on Arm."""

COLUMN = {EXPORT: "", FULL_PRECISION: "fp_", RUNTIME_INT8: "int8_"}
"""What the columns of each file begin with in a row of results."""


@dataclass(frozen=True)
class Benchmark:
    """``times`` by the number of images at a time; ``classes`` (N,) that each file predicts, and the true ones.

    ``trained`` is false where the full-precision weights are not at hand. Random ones take as long.
    """

    sizes: Mapping[str, int]
    integers: Mapping[str, InIntegers]
    times: Mapping[int, Times]
    classes: Mapping[str, Tensor]
    labels: Tensor
    trained: bool


def benchmark(settings: RunSettings) -> dict[str, float]:
    """Measure the ONNX file of ``settings.checkpoint``, print what came out and write it beside the file.

    Returns the ratios for one image.

    Raises ``ConfigError`` where there is no such file, or its images are not at hand.
    """
    if settings.results:
        check_results(settings.results)
    for name, least in (("batch", 1), ("rounds", 2), ("threads", 1), ("images", 1)):
        if (value := getattr(settings.benchmark, name)) < least:
            raise ConfigError(f"benchmark.{name}: must be at least {least}, got {value}")
    what = shipped(settings)
    if not (what.folder / MODEL).is_file():
        raise ConfigError(f"export.output: there is no file {what.folder / MODEL}; task=export writes it")
    measured = _measured(settings, what)
    for line in _said(measured, settings):
        print(line)
    rows = [_row(settings, what, measured, batch) for batch in measured.times]
    write_speed(what, {"hardware": hardware(), "rows": rows})
    if settings.results:
        for row in rows:
            append_row(settings.results, provenance() | row)
    one = measured.times[1]
    return {"of_full_precision": ratio(one, EXPORT, FULL_PRECISION).median,
            "of_int8": ratio(one, EXPORT, RUNTIME_INT8).median}  # fmt: skip


def _measured(settings: RunSettings, what: Shipped) -> Benchmark:
    images, wanted = what.header.images, settings.benchmark
    file = (what.folder / MODEL).read_bytes()
    with as_config_error(str(what.folder / MODEL)):
        fixed = batch_of(read(file))
    if fixed is not None:
        raise ConfigError(
            f"export.batch: {what.folder} is for {fixed} images at a time; export anew with export.batch=null"
        )
    data = load_data(normalized(settings, images), synthesizes=False)
    check_images(images, data.info, what.file)
    network, trained = _full_precision(settings, what, data)
    calibration = [plain(batch.image) for batch in data.calibration_batches(settings.quantize.calibration_batches)]
    with as_config_error("benchmark"):
        files = {EXPORT: file}
        files |= rivals(network, calibration, images.size, opset=settings.export.opset)
        integers = {name: in_integers(file, images.size) for name, file in files.items() if name != FULL_PRECISION}
    test, labels = _some(((b.image, b.target) for b in data.test_dataloader()), wanted.images)
    several = torch.cat(test).repeat(-(-wanted.batch // sum(map(len, test))), 1, 1, 1)[: wanted.batch]
    how = {"rounds": wanted.rounds, "threads": wanted.threads}
    times = {len(given): timed(files, given, **how) for given in (several[:1], several)}
    return Benchmark(
        sizes={name: len(file) for name, file in files.items()},
        integers=integers,
        times=times,
        classes=predicted(files, test, threads=wanted.threads),
        labels=labels,
        trained=trained,
    )


def _full_precision(settings: RunSettings, what: Shipped, data: VisionData) -> tuple[nn.Module, bool]:
    """The student's network in full precision, and whether its weights are those that the student began with."""
    if network_of(settings.model, data.info) != what.header.network:
        log.warning("full precision has random weights, which take as long: model=... is not the student's")
        return build_network(what.header.network, [what.header.network.builder]), False
    if must_train(settings.model, settings, data):
        log.warning("full precision has random weights, which take as long: model.weights names none")
        return build_model(settings.model, data.info).eval(), False
    weights = full_precision_weights(settings.model, settings, data)
    return build_model(settings.model, data.info, weights=weights).eval(), True


def _some(batches: Iterable[tuple[Tensor, Tensor]], count: int) -> tuple[list[Tensor], Tensor]:
    """The first ``count`` images, in batches, and their labels."""
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for image, target in batches:
        missing = count - sum(map(len, images))
        images.append(plain(image[:missing]))
        labels.append(target[:missing].cpu())
        if missing <= len(image):
            break
    return images, torch.cat(labels)


def _said(found: Benchmark, settings: RunSettings) -> list[str]:
    """What is printed, line by line."""
    flags, threads = ", ".join(_flags()) or "instructions unknown", settings.benchmark.threads
    lines = [f"{hardware()} ({flags}), {threads} thread{'s' * (threads > 1)}, {settings.benchmark.rounds} rounds"]
    lines += [f"{name}: {size / 1e6:.2f} MB" for name, size in found.sizes.items()]
    lines += [f"{name}: {counted}" for name, counted in found.integers.items()]
    for batch, times in found.times.items():
        for name, seconds in times.items():
            spread = Spread.of(seconds) * 1e3
            said = f"batch of {batch}, {name}: {_text(spread, '.2f')} ms"
            said += f", {1e3 * batch / spread.median:.1f} images/s" if batch > 1 else ""
            if name != EXPORT:
                said += f"; the export takes {_text(ratio(times, EXPORT, name), '.3f')} of that"
            lines.append(said)
    for name, same in _agreement(found).items():
        lines.append(f"{name}: {same:.1f} % of {len(found.labels)} predictions are those of full precision")
    return lines


def _flags() -> list[str]:
    found = processor_flags()
    return [flag for flag in FLAGS if flag in found]


def _text(spread: Spread, form: str) -> str:
    return f"{spread.median:{form}} ({spread.low:{form}} to {spread.high:{form}})"


def _agreement(found: Benchmark) -> dict[str, float]:
    """Percent of images on which each file predicts what full precision does; nothing where that is not trained."""
    if not found.trained:
        return {}
    expected = found.classes[FULL_PRECISION]
    return {name: _percent(found.classes[name] == expected) for name in (EXPORT, RUNTIME_INT8)}


def _percent(hits: Tensor) -> float:
    return 100 * float(hits.double().mean())


def _row(settings: RunSettings, what: Shipped, found: Benchmark, batch: int) -> dict[str, object]:
    """The row of a results file for one number of images at a time; times in milliseconds, shares from 0 to 1."""
    header, times = what.header, found.times[batch]
    weight, inputs = typical_bits(allocation_of(header))
    row: dict[str, object] = {
        "experiment": header.origin.get("experiment", ""), "task": "benchmark", "dataset": settings.data.plain["name"],
        **described(header), "w_bits": weight, "a_bits": inputs, "seed": header.origin.get("seed", ""),
        "size_bytes": header.size_bytes, "notes": f"load {os.getloadavg()[0]:.1f}", "batch": batch,
        "threads": settings.benchmark.threads, "rounds": settings.benchmark.rounds,
        "flags": " ".join(_flags()), "test_images": len(found.labels),
    }  # fmt: skip
    if found.trained:
        row |= {f"{COLUMN[name]}top1": _percent(classes == found.labels) for name, classes in found.classes.items()}
        row |= {f"{COLUMN[name]}agreement": same for name, same in _agreement(found).items()}
    row |= {f"{COLUMN[name]}onnx_bytes": size for name, size in found.sizes.items()}
    return row | timing_columns(times) | integer_columns(found.integers)


def timing_columns(times: Times) -> dict[str, object]:
    """Columns of a row of results: milliseconds of each file and the export's ratios, with quartiles."""
    row: dict[str, object] = {}
    for name, seconds in times.items():
        row |= _spread(f"{COLUMN[name]}ms", Spread.of(seconds) * 1e3)
    for name in (FULL_PRECISION, RUNTIME_INT8):
        row |= _spread(f"of_{COLUMN[name]}".rstrip("_"), ratio(times, EXPORT, name))
    return row


def integer_columns(integers: Mapping[str, InIntegers]) -> dict[str, object]:
    """Columns of a row of results: layers of each file, those in integers, and what stays in floating point."""
    row: dict[str, object] = {}
    for name, counted in integers.items():
        left = " ".join(f"{count} {operator}," for operator, count in counted.operators(integer=False).items())
        parts = {
            "layers": len(counted.layers), "integer_layers": sum(layer.integer for layer in counted.layers),
            "integer_macs": counted.macs_share, "in_float": left.rstrip(","),
        }  # fmt: skip
        row |= {f"{COLUMN[name]}{key}": value for key, value in parts.items()}
    return row


def _spread(column: str, spread: Spread) -> dict[str, object]:
    return {column: spread.median, f"{column}_low": spread.low, f"{column}_high": spread.high}
