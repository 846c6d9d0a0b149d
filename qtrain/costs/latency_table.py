"""How long layers take on one machine: a file of measured times by shape and bits, with what the machine is."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from qtrain.costs.geometry import LayerGeometry
from qtrain.spec import FULL_PRECISION, LayerBits
from qtrain.utils.atomic_write import write_text
from qtrain.utils.checks import finite_number
from qtrain.utils.errors import errors_of, first_line

T = TypeVar("T")

FORMAT = 1
"""A later qtrain may lay files out differently."""


@dataclass(frozen=True)
class LayerShape:
    """What a layer's time depends on besides its bits, for one image; fields are those of :class:`LayerGeometry`."""

    kind: str
    weight_shape: tuple[int, ...]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, geometry: LayerGeometry) -> "LayerShape":
        return cls(**{one.name: getattr(geometry, one.name) for one in fields(cls)})


@dataclass(frozen=True)
class Time:
    """Microseconds of one call: median and quartiles over the rounds."""

    us: float
    low: float
    high: float


Times = Mapping[LayerBits, Time]
"""By the bits of the weight and of the input."""


@dataclass(frozen=True)
class LatencyTable:
    """Times of layers by shape and bits, of one image, as ``machine`` takes them.

    ``network`` is whose layers were measured. ``rest`` are the microseconds of all that multiplies nothing: sums,
    pools, conversions, the call of the runtime itself, in the whole network with so many bits. ``peaks`` are the most
    multiplications a second that a layer reached, by bits, and ``bytes_per_second`` what a copy in memory moves.
    """

    network: str
    machine: Mapping[str, object]
    layers: Mapping[LayerShape, Times]
    rest: Mapping[LayerBits, float]
    peaks: Mapping[LayerBits, float]
    bytes_per_second: float
    names: Mapping[LayerShape, Sequence[str]] = field(default_factory=dict)

    def time(self, geometry: LayerGeometry, bits: LayerBits) -> Time | None:
        """The time of one call at ``bits``, or of the next wider kernel, in which a runtime computes them.

        ``None`` where the shape was not measured.
        """
        return narrowest(self.layers.get(LayerShape.of(geometry), {}), bits)


def narrowest(found: Mapping[LayerBits, T], bits: LayerBits) -> T | None:
    """Of what was ``found`` by bits, that of the narrowest kernel with room for ``bits``, if there is one."""
    room = [wide for wide in found if wide.weight >= bits.weight and wide.input >= bits.input]
    return found[min(room, key=lambda wide: wide.weight * wide.input)] if room else None


def write_table(path: Path, table: LatencyTable) -> None:
    """Write ``table`` as JSON to ``path``, whose folder is made where it is absent."""
    layers = [
        {"layers": list(table.names.get(shape, ())), **asdict(shape)}
        | {"times": [{**bits._asdict(), **asdict(time)} for bits, time in times.items()]}
        for shape, times in table.layers.items()
    ]
    content = {
        "format": FORMAT,
        "unit": "us",
        "network": table.network,
        "machine": dict(table.machine),
        "bytes_per_second": table.bytes_per_second,
        "macs_per_second": [{**bits._asdict(), "peak": peak} for bits, peak in table.peaks.items()],
        "rest": [{**bits._asdict(), "us": us} for bits, us in table.rest.items()],
        "layers": layers,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=1) + "\n")


def read_table(path: Path | str) -> LatencyTable:
    """The table in the file at ``path``. Raises ``ValueError`` where there is none that this qtrain reads."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"there is no file {path}; task=profile writes it")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["format"]
        table = _table(content) if version == FORMAT else None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        about = f"no {error}" if isinstance(error, KeyError) else first_line(error)
        raise ValueError(f"{path} is no table of latencies ({about}); task=profile writes one") from error
    if table is None:
        raise ValueError(f"{path} has version {version}, this qtrain reads {FORMAT}; profile anew")
    return table


def _table(content: Mapping[str, Any]) -> LatencyTable:
    shapes = {_shape(row): row for row in content["layers"]}
    table = LatencyTable(
        network=content["network"],
        machine=content["machine"],
        layers={
            shape: {
                _bits(one): Time(*(_number(one, key, or_zero=True) for key in ("us", "low", "high")))
                for one in row["times"]
            }
            for shape, row in shapes.items()
        },
        rest={_bits(one): _number(one, "us", or_zero=True) for one in content["rest"]},
        peaks={_bits(one): _number(one, "peak") for one in content["macs_per_second"]},
        bytes_per_second=_number(content, "bytes_per_second"),
        names={shape: row["layers"] for shape, row in shapes.items()},
    )
    if not table.peaks:
        raise ValueError("macs_per_second is empty")
    return table


def _number(row: Mapping[str, Any], key: str, *, or_zero: bool = False) -> float:
    with errors_of(key):
        value = finite_number(row[key])
        if value < 0 or (value == 0 and not or_zero):
            raise ValueError(f"must be {'at least' if or_zero else 'above'} 0, got {value:g}")
    return value


def _bits(row: Mapping[str, Any]) -> LayerBits:
    return LayerBits(int(row["weight"]), int(row["input"]))


def _shape(row: Mapping[str, Any]) -> LayerShape:
    return LayerShape(**{one.name: _tuples(row[one.name]) for one in fields(LayerShape)})


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def in_float(bits: LayerBits) -> bool:
    """Whether a layer of ``bits`` multiplies in floating point."""
    return max(bits) >= FULL_PRECISION
