"""A student as the shortest file that gives it again: its codes at their bit width, and what it needs to run."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from qtrain.models.trial import placed
from qtrain.nn.many_bits import ManyBits, by_width
from qtrain.nn.stored import stored_parts
from qtrain.packed.header import FileSize, Header, Images, Network, from_bytes, to_bytes
from qtrain.packed.load import build_student
from qtrain.packed.memory_order import has_channels_last
from qtrain.packed.narrow import Narrow, NarrowLayer, entry_of, norm_entries, rounding_of
from qtrain.packed.networks import Builder, build_network
from qtrain.packed.stored import StoredInput, StoredLayer, StoredWeight, state_of
from qtrain.packed.structure import structure_of
from qtrain.quantizers.base import MakeQuantizer, Quantizer
from qtrain.quantizers.requantized import Requantized
from qtrain.quantizers.stored import Stored
from qtrain.quantizers.wrappers.wrapper import TrainingWrapper, innermost
from qtrain.storage.base import pack
from qtrain.storage.bits import bits_to_bytes
from qtrain.storage.description import describe
from qtrain.utils.atomic_write import atomic_write
from qtrain.utils.errors import one_line
from qtrain.utils.eval_mode import evaluating
from qtrain.utils.sharing import place_of

T = TypeVar("T")


def save_student(
    student: nn.Module,
    path: Path | str,
    *,
    network: Network,
    images: Images,
    builders: Sequence[Builder] = (),
    metrics: Mapping[str, float | int | None] | None = None,
    origin: Mapping[str, str] | None = None,
) -> FileSize:
    """Write ``student`` to ``path`` and return the size; :func:`qtrain.packed.load.load_student` reads it.

    ``network`` says how it was built before it was converted; ``builders`` admits code of one's own, as in loading.
    Before the file takes its place it is loaded once and must give the logits of ``student``, bit for bit. Raises
    ``ValueError`` where the network cannot be built again, is another one, or where a weight is not finite.
    """
    path = Path(path)
    with evaluating(student):
        try:
            header, tensors = packed(student, network, images, builders, metrics or {}, origin or {})
            data, size = to_bytes(header, tensors)
            _check_round_trip(student, data, path, builders)
        except (AttributeError, LookupError, TypeError, RuntimeError) as error:
            raise ValueError(
                f"{path}: the network that {network.builder} builds is not that of the student ({one_line(error)}); "
                "give the builder and the options that the student was made with"
            ) from error
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)
        temporary.chmod(0o644)
    return size


def file_alone(header: Header, student: nn.Module, builders: Sequence[Builder] = ()) -> bytes:
    """The file of one width of a student of many bits, as ``header`` and ``student`` say that was loaded from such."""
    network, images = header.network, header.images
    data, _ = to_bytes(*packed(student, network, images, builders, header.metrics, header.origin))
    return data


@torch.no_grad()
def packed(
    student: nn.Module,
    network: Network,
    images: Images,
    builders: Sequence[Builder],
    metrics: Mapping[str, float | int | None],
    origin: Mapping[str, str],
) -> tuple[Header, dict[str, Tensor]]:
    """Header and payload of ``student``, which is in eval mode."""
    if isinstance(student, ManyBits):
        widest, *_ = student.students.values()
        header, payload = packed(widest, network, images, builders, metrics, origin)
        narrow = {str(bits): _narrow(one, widest, payload, entry_of(bits)) for bits, one in student.others.items()}
        return replace(header, bits=student.widths[0], narrow=narrow, size_bytes=_size(payload)), payload
    parts = stored_parts(student)
    tensors: dict[str, Tensor] = {name: tensor.detach() for name, tensor in parts.plain.items()}
    weights: list[StoredWeight] = []
    inputs: list[StoredInput] = []
    layers: dict[str, StoredLayer] = {}
    for name, layer in parts.weights.items():
        assert layer.weight_quantizer is not None
        stored = layer.weight_quantizer.quantize(layer.effective_weight())
        tensors[f"{name}.weight"] = _octets(pack(stored))
        shape = tuple(layer.weight_quantizer.spec.shape)
        last = has_channels_last(layer.weight_quantizer(layer.effective_weight()))
        kind = StoredWeight(_method(layer.weight_quantizer), stored.bits, shape, describe(stored), last)
        layers[name] = StoredLayer(weight=_place(kind, weights))
    for name, owner in parts.tied.items():
        layers[name] = StoredLayer(weight=layers[owner].weight, tied=owner)
    for name, quantizer in parts.inputs.items():
        if bits := [part.write() for part in quantizer.stored_state().values()]:
            tensors[state_of(name)] = _octets(bits_to_bytes(torch.cat(bits)))
        place = _place(_described(name, quantizer), inputs)
        layers[name] = replace(layers.get(name, StoredLayer()), input=place)
    for name in (*parts.shared_inputs, *parts.tensors):
        layers.setdefault(name, StoredLayer())
    return (
        Header(
            network=network,
            images=images,
            structure=structure_of(student, build_network(network, builders)),
            weights=tuple(weights),
            inputs=tuple(inputs),
            layers=layers,
            size_bytes=_size(tensors),
            metrics=dict(metrics),
            origin=dict(origin),
        ),
        tensors,
    )


def _narrow(student: nn.Module, widest: nn.Module, payload: dict[str, Tensor], entry: str) -> Narrow:
    """What the ``student`` of fewer bits has of its own; its part of the ``payload`` is added there as ``entry``."""
    parts, wide = stored_parts(student), stored_parts(widest)
    shared = {place_of(tensor) for tensor in wide.plain.values()}
    own = {name: tensor.detach() for name, tensor in parts.plain.items() if place_of(tensor) not in shared}
    norms = norm_entries(wide.plain, widest)
    if own.keys() != set(norms):
        odd = sorted(own.keys() ^ set(norms))[0]
        raise ValueError(
            f"{odd} is not as in other students of many bits: their batch norms differ, and no other tensor"
        )
    quantizers: list[StoredInput] = []
    layers: dict[str, NarrowLayer] = {}

    def kept(name: str, quantizer: Quantizer, state: str) -> int:
        if bits := [part.write() for part in quantizer.stored_state().values()]:
            own[state] = _octets(bits_to_bytes(torch.cat(bits)))
        return _place(_described(name, quantizer), quantizers)

    for name, layer in parts.weights.items():
        rounds = layer.weight_quantizer
        assert rounds is not None
        if rounds is not wide.weights[name].weight_quantizer:
            inner = rounds.inner if isinstance(rounds, Requantized) else rounds  # of a student that was loaded
            layers[name] = NarrowLayer(weight=kept(name, inner, rounding_of(name)))
    for name, owner in parts.tied.items():
        layers[name] = NarrowLayer(weight=layers.get(owner, NarrowLayer()).weight)
    for name, quantizer in parts.inputs.items():
        layers[name] = replace(layers.get(name, NarrowLayer()), input=kept(name, quantizer, state_of(name)))
    states = [state for name in sorted(layers) for state in (rounding_of(name), state_of(name)) if state in own]
    octets = [own[name].cpu().contiguous().reshape(-1).view(torch.uint8) for name in (*norms, *states)]
    payload[entry] = torch.cat(octets) if octets else torch.zeros(0, dtype=torch.uint8)
    return Narrow(tuple(quantizers), layers)


def _size(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _place(kind: T, kinds: list[T]) -> int:
    """Where ``kind`` stands in ``kinds``, to which it is added if it is new."""
    if kind not in kinds:
        kinds.append(kind)
    return kinds.index(kind)


def _described(name: str, quantizer: Quantizer) -> StoredInput:
    make = _constructor(quantizer)
    if make is None:
        raise ValueError(f"{name}: how its quantizer was made is not known; convert the model by qtrain")
    return StoredInput(
        quantizer=_method(quantizer),
        bits=int(quantizer.bits),
        signed=bool(quantizer.signed),
        channel_axis=quantizer.spec.channel_axis,
        made_by=describe(make),
        dtype=str(quantizer.code_high.dtype).removeprefix("torch."),
    )


def _constructor(quantizer: Quantizer) -> MakeQuantizer | None:
    """How ``quantizer`` is made, without wrappers that only training sees."""
    make = quantizer.made_by
    while isinstance(quantizer, TrainingWrapper) and isinstance(make, partial):
        make, quantizer = make.keywords["quantizer"], quantizer.inner
    return make


def _method(quantizer: Quantizer) -> str:
    return quantizer.method if isinstance(quantizer, Stored) else type(innermost(quantizer)).__name__


def _octets(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())


@torch.no_grad()
def _check_round_trip(student: nn.Module, data: bytes, path: Path, builders: Sequence[Builder]) -> None:
    """That the file gives the logits of ``student``, for noise of the size of its images."""
    header, tensors = from_bytes(data, path)
    noise = placed(torch.randn(2, *header.images.size, generator=torch.Generator().manual_seed(0)), student)
    loaded = build_student(header, tensors, builders).to(noise.device)
    pairs = zip(by_width(loaded).values(), by_width(student).values(), strict=True)
    if not all(torch.equal(one(noise).nan_to_num(), other(noise).nan_to_num()) for one, other in pairs):
        raise ValueError(
            f"{path}: the network that {header.network.builder} builds computes something else with the student's "
            "weights; give the builder and the options that the student was made with"
        )
