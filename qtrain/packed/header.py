"""The header of a student's file: all that is needed to build and run it, as plain values.

The file is a safetensors file, so that any reader of that format opens it. Its metadata hold this header as JSON, and a
digest of the header, the index of tensors and the payload.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from qtrain.packed.narrow import Narrow, NarrowLayer, lacking
from qtrain.packed.stored import StoredInput, StoredLayer, StoredWeight
from qtrain.storage.description import Plain
from qtrain.utils.errors import one_line
from qtrain.utils.plain import from_plain

KEY = "qtrain_student"
"""Of the metadata. It is the only one: the order of several is left to chance, and equal students have equal files."""

OLDEST, VERSION = 2, 3
"""Versions of the format, the newest for files of many bits only: an older qtrain does not know their fields."""

_PREFIX = 8
"""Bytes in front of a safetensors header, which say how long it is."""


@dataclass(frozen=True)
class Network:
    """How the full-precision network is built: the dotted path of a builder, and the options it is called with."""

    builder: str
    options: dict[str, Plain] = field(default_factory=dict)


@dataclass(frozen=True)
class Images:
    """What the network takes: ``size`` (C, H, W), ``mean`` and ``std`` of each channel in units of pixel value / 255.

    ``classes`` are the names of the outputs in order, empty where they have none. An image of another size is resized
    by ``interpolation``, so that H is ``crop_pct`` of its shorter side, and cut out of the middle.
    """

    size: tuple[int, ...]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    classes: tuple[str, ...] = ()
    crop_pct: float = 1.0
    interpolation: str = "bicubic"


@dataclass(frozen=True)
class Structure:
    """What conversion changed in the network besides its layers.

    ``folded`` are batch norms that were merged into the layer before them, ``relu`` the ReLU6 that became ReLU, by
    their names once norms are folded. ``operations`` are the kinds of operations that became modules, ``exposed`` the
    modules in whose forward they were, ``given`` the optional arguments that these get. ``merged_norms`` maps a layer
    to the batch norm behind it whose factor its stored weight contains, and ``fixed_factors`` to the factors (O,) of
    its channels that do not follow the norm, 0 for the others. ``shared_inputs`` maps a layer to the one whose input
    quantizer it has too, ``tensors`` to the one whose input quantizer works on its input before its own.
    ``fused_biases``: attentions' biases moved into their qkv layers. ``dtype`` is that of the parameters, ``None``
    where they have several.
    """

    folded: tuple[str, ...] = ()
    relu: tuple[str, ...] = ()
    operations: tuple[str, ...] = ()
    exposed: tuple[str, ...] = ()
    given: dict[str, tuple[str, ...]] = field(default_factory=dict)
    merged_norms: dict[str, str] = field(default_factory=dict)
    fixed_factors: dict[str, tuple[float, ...]] = field(default_factory=dict)
    shared_inputs: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)
    fused_biases: bool = False
    channels_last: bool = False
    dtype: str | None = None


@dataclass(frozen=True)
class Header:
    """What a student's file says of itself; ``layers`` by qualified name, ``weights`` and ``inputs`` each kind once.

    The codes of a layer's weight are the entry :meth:`codes_of` of the payload, the state of its input quantizer is
    the entry :func:`qtrain.packed.stored.state_of`, which is left out where it has no bits. ``metrics`` are accuracies
    in percent as they were recorded, ``origin`` where the file comes from: config hash, commit, versions, date.
    ``size_bytes`` is the length of the payload, which is the cost report's size. A student of many bits is described at
    its widest, ``bits``; ``narrow`` are the other widths, by their number as text.
    """

    network: Network
    images: Images
    structure: Structure
    weights: tuple[StoredWeight, ...]
    inputs: tuple[StoredInput, ...]
    layers: dict[str, StoredLayer]
    size_bytes: int
    metrics: dict[str, float | int | None] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    bits: int | None = None
    narrow: dict[str, Narrow] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.bits is None) != (not self.narrow) or not all(width.isdecimal() for width in self.narrow):
            raise ValueError("of a student of many bits, each width needs its number")
        for narrow in self.narrow.values():
            if unknown := sorted(narrow.layers.keys() - self.layers.keys()):
                raise ValueError(f"layer {unknown[0]} has fewer bits at one width, and no bits at the widest")
        for name, layer in self.layers.items():
            for index, kinds in ((layer.weight, self.weights), (layer.input, self.inputs)):
                if index is not None and not 0 <= index < len(kinds):
                    raise ValueError(f"layer {name} is of kind {index}, of which {len(kinds)} are described")

    def weight_of(self, layer: str) -> StoredWeight | None:
        """How the weight of ``layer`` is stored; ``None`` for one in full precision."""
        index = self.layers[layer].weight
        return None if index is None else self.weights[index]

    def input_of(self, layer: str) -> StoredInput | None:
        """How the input of ``layer`` is quantized; ``None`` for one in full precision."""
        index = self.layers[layer].input
        return None if index is None else self.inputs[index]

    def codes_of(self, layer: str) -> str:
        """The entry of the payload with the codes of the weight of ``layer``."""
        return f"{self.layers[layer].tied or layer}.weight"

    def at(self, bits: int) -> "Header":
        """This header as that of the student of ``bits`` bits alone; its weights have no description to decode them.

        The accuracy is that of this width. Raises ``ValueError`` for a width that the file lacks.
        """
        if bits != self.bits and str(bits) not in self.narrow:
            raise ValueError(lacking(self.widths, bits))
        metrics = {name: value for name, value in self.metrics.items() if "/" not in name}
        metrics |= {name: self.metrics[key] for name in metrics if (key := f"{name}/w{bits}") in self.metrics}
        alone = replace(self, bits=None, narrow={}, metrics=metrics)
        if bits == self.bits:
            return alone
        narrow, weights, layers = self.narrow[str(bits)], list(self.weights), {}
        for name, layer in self.layers.items():
            own, weight = narrow.layers.get(name, NarrowLayer()), layer.weight
            if weight is not None and own.weight is not None:
                kind = narrow.quantizers[own.weight]
                weights.append(replace(self.weights[weight], quantizer=kind.quantizer, bits=kind.bits, stored=None))
                weight = len(weights) - 1
            layers[name] = replace(layer, weight=weight, input=own.input)
        return replace(alone, weights=tuple(weights), inputs=narrow.quantizers, layers=layers)

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths of a student of many bits, the widest first; none of a student of one."""
        return tuple(sorted((*map(int, self.narrow), *(() if self.bits is None else (self.bits,))), reverse=True))

    def plain(self) -> dict[str, Plain]:
        whole = {"format_version": VERSION if self.narrow else OLDEST, **asdict(self)}
        for described in (whole, *whole["narrow"].values()):
            described["layers"] = {
                name: {key: value for key, value in layer.items() if value is not None}
                for name, layer in described["layers"].items()
            }
        if not self.narrow:
            del whole["bits"], whole["narrow"]
        if not self.structure.given:  # as files of before have it
            del whole["structure"]["given"]
        return whole


@dataclass(frozen=True)
class FileSize:
    """Bytes of a student's file, and how many of them are its header; the rest is what the cost report counts."""

    file_bytes: int
    header_bytes: int


def to_bytes(header: Header, tensors: Mapping[str, Tensor]) -> tuple[bytes, FileSize]:
    """The file of ``header`` and ``tensors``, and its size."""
    # A copy, since the format refuses tensors that lie on the same memory.
    contiguous = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}

    def file(digest: str) -> bytes:
        data: bytes = save_tensors(contiguous, {KEY: _json({"sha256": digest, "student": header.plain()})})
        return data

    data = file(_digest(header.plain(), file("0" * 64)))
    return data, FileSize(file_bytes=len(data), header_bytes=_payload_at(data))


def from_bytes(data: bytes, source: Path | str) -> tuple[Header, dict[str, Tensor]]:
    """Header and tensors of the file that holds ``data``.

    Raises ``ValueError`` with one line, which names ``source``, where it is no student's file, damaged, or of a later
    version of the format.
    """
    described, tensors = _opened(data, source)
    try:
        plain, digest = dict(described["student"]), described["sha256"]
        version, found = plain.pop("format_version"), _digest(described["student"], data)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{source} is damaged: its description cannot be read; copy it anew") from error
    if type(version) is not int or not OLDEST <= version <= VERSION:
        remedy = "write it anew" if type(version) is int and version < OLDEST else "update qtrain"
        known = f"{OLDEST} and {VERSION}"
        raise ValueError(f"{source} has version {version!r} of the format, this qtrain reads {known}; {remedy}")
    if digest != found:
        raise ValueError(f"{source} is damaged or was changed: its content does not have its digest; copy it anew")
    try:
        header = from_plain(Header, plain, "the description")
        if (size := sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())) != header.size_bytes:
            raise ValueError(f"its tensors have {size} bytes, its description says {header.size_bytes}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is no whole student's file: {one_line(error)}; write it anew") from error
    return header, tensors


def read(path: Path | str) -> tuple[Header, dict[str, Tensor]]:
    """Header and tensors of the file at ``path``. Raises as :func:`from_bytes`, and where there is no file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; give the student.safetensors of a run")
    return from_bytes(path.read_bytes(), path)


def _opened(data: bytes, source: Path | str) -> tuple[Any, dict[str, Tensor]]:
    try:
        tensors = load_tensors(data)
        metadata = json.loads(data[_PREFIX : _payload_at(data)]).get("__metadata__") or {}
        described = json.loads(metadata[KEY], parse_constant=_refuse) if KEY in metadata else None
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{source} is damaged or no safetensors file ({one_line(error)}); copy it anew") from error
    if described is None:
        raise ValueError(f"{source} is no student's file: it does not say how its network is built; load its weights")
    return described, tensors


def _json(plain: Plain) -> str:
    return json.dumps(plain, separators=(",", ":"), allow_nan=False)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def _payload_at(data: bytes) -> int:
    return _PREFIX + int.from_bytes(data[:_PREFIX], "little")


def _digest(plain: Plain, data: bytes) -> str:
    """Of the description, the index of tensors and the payload."""
    index = json.loads(data[_PREFIX : _payload_at(data)])
    entries = {name: index[name] for name in sorted(index) if name != "__metadata__"}
    found = hashlib.sha256(f"{_json(plain)}\n{_json(entries)}\n".encode())
    found.update(memoryview(data)[_payload_at(data) :])
    return found.hexdigest()


def dtype_of(name: str) -> torch.dtype:
    """The type of numbers with this name. Raises ``ValueError`` where there is none."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"there is no type of numbers {name!r}")
    return found
