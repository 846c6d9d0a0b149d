"""How long each layer of a network takes on this machine, as a file that a search over bits reads."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from qtrain.allocate.uniform import Uniform
from qtrain.convert.calibrate import calibrate
from qtrain.costs.geometry import LayerGeometry, layer_geometries
from qtrain.costs.latency_table import LatencyTable, LayerShape, Time, write_table
from qtrain.deployment.benchmark.timing import Spread
from qtrain.deployment.onnx.write import export
from qtrain.deployment.parity.runtimes import chosen
from qtrain.deployment.profile.measure import Runs, layer_times, memory_speed, time_of_rest
from qtrain.deployment.profile.sessions import version_of
from qtrain.functional.layout import plain
from qtrain.pipeline.build_model import build_model, example_input
from qtrain.pipeline.conversion import convert, quiet_conversion
from qtrain.pipeline.load_data import load_data
from qtrain.pipeline.prepare import settle_for_target_
from qtrain.pipeline.results import append_row, check_results, provenance
from qtrain.settings.component import Component
from qtrain.settings.run_settings import RunSettings
from qtrain.spec import FULL_PRECISION, DataInfo, LayerBits
from qtrain.utils.checks import check_writable
from qtrain.utils.errors import ConfigError, as_config_error
from qtrain.utils.processor import processor_flags

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Profile:
    """The ``table``, and how long the whole network took, in microseconds, by its bits."""

    table: LatencyTable
    whole: Mapping[LayerBits, Spread]
    geometries: Sequence[LayerGeometry]

    def predicted(self, bits: LayerBits) -> float:
        """Microseconds of the network at ``bits`` by the table."""
        times = [(one, self.table.time(one, bits)) for one in self.geometries]
        return self.table.rest[bits] + sum(one.calls * time.us for one, time in times if time is not None)


def profile(settings: RunSettings) -> dict[str, float]:
    """Measure the layers of ``settings.model`` and write the table; by bits, what it predicts of the measured network.

    Raises ``ConfigError`` for a setting that cannot be, and where the network has no form in ONNX.
    """
    wanted = settings.profile
    if settings.results:
        check_results(settings.results)
    for name, value, least in (("rounds", wanted.rounds, 2), ("threads", wanted.threads, 1)):
        if value < least:
            raise ConfigError(f"profile.{name}: must be at least {least}, got {value}")
    if wrong := [bits for bits in wanted.widths if bits != FULL_PRECISION and not 1 <= bits <= 8]:
        raise ConfigError(f"profile.widths: must be 1 to 8 bits, or {FULL_PRECISION}, got {wrong[0]}")
    with as_config_error("profile.runtime"):
        chosen([wanted.runtime])
    path = Path(wanted.output).expanduser() if wanted.output else _place(settings)
    check_writable(path.parent, "profile.output")
    found = _measured(settings)
    write_table(path, found.table)
    for line in _said(found):
        print(line)
    print(f"cost=latency reads it: table={path}")
    if settings.results:
        for bits in found.whole:
            append_row(settings.results, provenance() | _row(settings, found, bits))
    return {f"w{bits.weight}a{bits.input}": found.predicted(bits) / one.median for bits, one in found.whole.items()}


def _place(settings: RunSettings) -> Path:
    return Path(settings.output) / "profiles" / f"{settings.model.name}-{settings.profile.runtime}.json"


def _measured(settings: RunSettings) -> Profile:
    wanted, packed = settings.profile, settings.export.weights == "packed"
    data = load_data(settings, synthesizes=False)
    images = [plain(batch.image) for batch in data.calibration_batches(1)]
    runs = Runs(wanted.runtime, wanted.threads, wanted.rounds, settings.export.opset, packed)
    model = build_model(settings.model, data.info).eval()
    geometries = layer_geometries(model, example_input(data.info))
    layers: dict[LayerShape, dict[LayerBits, Time]] = {}
    rest: dict[LayerBits, float] = {}
    whole: dict[LayerBits, Spread] = {}
    peaks: dict[LayerBits, float] = {}
    for width in wanted.widths:
        bits = LayerBits(width, width)
        log.info("measuring %d layers at %d bits", len(geometries), width)
        with as_config_error("profile"):
            file, size = _file(settings, data.info, images, width), _size(data.info)
            measured = layer_times(geometries, bits, runs, network=file, size=size)
            whole[bits], rest[bits] = measured.whole, time_of_rest(file, size, runs)
        for shape, time in measured.times.items():
            layers.setdefault(shape, {})[bits] = time
        for shape, reason in measured.failed.items():
            log.warning("%s %s at %d bits is not in the table: %s", shape.kind, shape.weight_shape, width, reason)
        peaks[bits] = _peak(measured.times, geometries)
    names: dict[LayerShape, list[str]] = {}
    for one in geometries:
        names.setdefault(LayerShape.of(one), []).append(one.name)
    table = LatencyTable(
        network=settings.model.name,
        machine=_machine(runs),
        layers=layers,
        rest=rest,
        peaks={bits: speed for bits, speed in peaks.items() if speed > 0},
        bytes_per_second=memory_speed(),
        names={shape: names[shape] for shape in layers},
    )
    return Profile(table, whole, geometries)


def _peak(times: Mapping[LayerShape, Time], geometries: Sequence[LayerGeometry]) -> float:
    """The most multiplications a second that a layer reached."""
    shapes = [(one.macs, one.calls, times.get(LayerShape.of(one))) for one in geometries]
    return max((1e6 * n / calls / time.us for n, calls, time in shapes if calls and time and time.us), default=0.0)


def _file(settings: RunSettings, info: DataInfo, images: Sequence[Tensor], width: int) -> bytes:
    """The whole network with all layers at ``width`` bits, as the settings quantize and export it."""
    model: nn.Module = build_model(settings.model, info)
    if width < FULL_PRECISION:
        options = {"weight": width, "input": width}
        target = f"{Uniform.__module__}.{Uniform.__qualname__}"
        bits = Component("profile.widths", {"_target_": target, **options}, Uniform, options)
        uniform = replace(settings, quantize=replace(settings.quantize, bits=bits))
        with quiet_conversion():
            calibrate(model, images, convert(uniform, model, example_input(info)).plans)
            if settings.target is not None:
                settle_for_target_(model)
    packed = settings.export.weights == "packed"
    return export(model.eval(), _size(info), opset=settings.export.opset, batch=1, packed=packed).to_bytes()


def _size(info: DataInfo) -> tuple[int, int, int]:
    return info.in_channels, info.image_size, info.image_size


def _machine(runs: Runs) -> dict[str, object]:
    """What was measured on, and how."""
    return {
        **provenance(),
        "flags": sorted(processor_flags()),
        "runtime": runs.runtime,
        "version": version_of(runs.runtime),
        "threads": runs.threads,
        "rounds": runs.rounds,
        "weights": "packed" if runs.packed else "bytes",
        "clock": "processor time" if runs.threads == 1 else "time",
        "load": round(os.getloadavg()[0], 1),
    }


def _said(found: Profile) -> list[str]:
    """What is printed: a row for each shape, and the whole network beside the sum of the table."""
    machine, table = found.table.machine, found.table
    lines = [f"{machine['hardware']}, {machine['runtime']} {machine['version']}, {machine['threads']} thread(s)"]
    for shape, times in table.layers.items():
        number = sum(one.calls for one in found.geometries if LayerShape.of(one) == shape)
        spread = ", ".join(f"w{bits.weight}a{bits.input} {time.us:.1f} us" for bits, time in times.items())
        lines.append(f"{number} x {shape.kind} {'x'.join(map(str, shape.weight_shape))}: {spread}")
    for bits, measured in found.whole.items():
        predicted = found.predicted(bits)
        error = 100 * (predicted / measured.median - 1)
        lines.append(
            f"w{bits.weight}a{bits.input}: the network takes {measured.median:.0f} us ({measured.low:.0f} to "
            f"{measured.high:.0f}), the table says {predicted:.0f} ({error:+.1f} %)"
        )
    return lines


def _row(settings: RunSettings, found: Profile, bits: LayerBits) -> dict[str, object]:
    """The row of a results file for the whole network at ``bits``; times in microseconds."""
    machine, measured, predicted = found.table.machine, found.whole[bits], found.predicted(bits)
    layers = [found.table.time(one, bits) for one in found.geometries]
    return {
        "experiment": settings.experiment or "", "task": "profile", "dataset": settings.data.plain["name"],
        "model": settings.model.name, "w_bits": bits.weight, "a_bits": bits.input, "seed": settings.seed,
        "bops": sum(one.macs for one in found.geometries) * bits.weight * bits.input,
        "notes": f"load {machine['load']}", "runtime": machine["runtime"], "version": machine["version"],
        "target": "" if settings.target is None else settings.target.plain["name"],
        "threads": machine["threads"], "rounds": machine["rounds"],
        "shapes": len(found.table.layers), "layers": sum(time is not None for time in layers),
        "measured_us": measured.median, "measured_us_low": measured.low, "measured_us_high": measured.high,
        "predicted_us": predicted, "rest_us": found.table.rest[bits],
        "error_percent": 100 * (predicted / measured.median - 1),
    }  # fmt: skip
