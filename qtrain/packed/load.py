"""A student from its file alone: no config, no data set, and no code from the file."""

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qtrain.convert.many_bits import share_
from qtrain.convert.replace import quantized_form, replace_module
from qtrain.models.layer_kinds import LayerSpec, describe_layer
from qtrain.nn import Operand, QuantConv, QuantConvTranspose, QuantLayer, QuantWeighted
from qtrain.nn.conv_transpose import outputs_first
from qtrain.nn.folded import FoldedWeight
from qtrain.nn.many_bits import ManyBits
from qtrain.nn.stored import COUNTERS
from qtrain.packed.header import Header, dtype_of, read
from qtrain.packed.memory_order import order_
from qtrain.packed.narrow import Narrow, NarrowLayer, entry_of, lacking, norm_entries, rounding_of
from qtrain.packed.networks import Builder, admitted_names, build_network
from qtrain.packed.stored import StoredInput, StoredWeight, state_of
from qtrain.packed.structure import restructure_
from qtrain.quantizers.base import Quantizer
from qtrain.quantizers.stored import Stored, values_of
from qtrain.spec import QuantSpec
from qtrain.storage.base import QTensor
from qtrain.storage.bits import bytes_to_bits
from qtrain.storage.description import VALUES, restore
from qtrain.utils.errors import one_line
from qtrain.utils.sharing import place_of, shared_tensors

QUANTIZERS = (*VALUES, "qtrain.quantizers")
"""Where the classes of a file's quantizers are defined."""

IMAGES = "qtrain_images"
"""The attribute in which a student that was loaded has what its file says of images."""


def load_student(path: Path | str, *, bits: int | None = None, builders: Sequence[Builder] = ()) -> nn.Module:
    """The student of the file at ``path``: a network in eval mode on the CPU, whose weights do not train.

    Its logits equal those of the student that was saved, bit for bit on the same machine. It knows the size and the
    normalization of its images and the names of its classes, for whoever saves or exports it again. Code outside of
    qtrain and timm, of a network or quantizer of one's own, is imported only where ``builders`` names it: a class or
    function, its dotted name, or its package. Raises ``FileNotFoundError`` where there is no file, and ``ValueError``
    with one line where the file is truncated, foreign, changed or newer, or names code that was not admitted.

    A file of many bits gives a :class:`~qtrain.nn.many_bits.ManyBits` that computes with ``bits`` bits, or else with
    the most that it has; :func:`qtrain.set_bits` changes them without loading again. Raises ``ValueError`` for
    ``bits`` that the file lacks.

    >>> import qtrain, timm, torch
    >>> images = torch.rand(2, 3, 32, 32)
    >>> student = qtrain.quantize(timm.create_model("resnet10t", num_classes=4), images)
    >>> _ = qtrain.save(student, "student.safetensors")
    >>> torch.equal(qtrain.load("student.safetensors")(images), student(images))
    True
    """
    header, tensors = read(path)
    if bits is not None and bits not in header.widths:
        raise ValueError(f"{path}: {lacking(header.widths, bits)}")
    try:
        given = builders if isinstance(builders, Sequence) and not isinstance(builders, str) else [builders]
        student = build_student(header, tensors, given)
    except Exception as error:  # whatever a constructor does with the options of a file that nobody vouches for
        raise ValueError(f"{path} cannot be loaded: {one_line(error)}") from error
    for one in student.students.values() if isinstance(student, ManyBits) else [student]:
        setattr(one, IMAGES, header.images)
    if bits is not None and isinstance(student, ManyBits):
        student.use_(bits)
    return student


@torch.no_grad()
def build_student(header: Header, tensors: Mapping[str, Tensor], builders: Sequence[Builder] = ()) -> nn.Module:
    """The student that ``header`` and ``tensors`` describe. Raises ``ValueError`` where they do not fit together."""
    if header.narrow:
        return _many_bits(header, tensors, builders)
    network = build_network(header.network, builders, stored_bytes=header.size_bytes)
    restructure_(network, header.structure)
    coded = {name: header.codes_of(name) for name, layer in header.layers.items() if layer.weight is not None}
    states = {state_of(name) for name, layer in header.layers.items() if layer.input is not None}
    layers = {name: _swapped_in(network, name, coded=name in coded) for name in header.layers}
    plain = {name: tensor for name, tensor in tensors.items() if name not in states.union(coded.values())}
    _fill_(network, plain, {layers[name] for name in coded})
    code = (*QUANTIZERS, *admitted_names(builders))
    shared: dict[str, tuple[nn.Parameter, Stored]] = {}
    overlapping = shared_tensors(network)
    for name, layer in layers.items():
        weight, inputs = header.weight_of(name), header.input_of(name)
        if weight is not None:
            if isinstance(layer, Operand):
                raise ValueError(f"layer {name} has no weight, the file has one")
            key = coded[name]
            if f"{name}.weight" in overlapping:  # the others may have another in the file
                layer.weight = nn.Parameter(torch.empty_like(layer.weight))
            tied = shared.get(key)
            shared[key] = layer.weight, layer.weight_quantizer = _weight(weight, key, layer, tensors, code, tied)
        if inputs is not None:
            layer.input_quantizer = _quantizer(inputs, state_of(name), tensors, code)
    for name, owner in header.structure.shared_inputs.items():
        layers[name].input_quantizer = layers[owner].input_quantizer
    for name, owner in header.structure.tensors.items():
        layers[name].tensor_quantizer = layers[owner].input_quantizer
    for name, norm in header.structure.merged_norms.items():
        fixed = header.structure.fixed_factors.get(name)
        _merge_norm_(network.get_submodule(name), network.get_submodule(norm), fixed)
    if header.structure.channels_last:
        network.to(memory_format=torch.channels_last)
    for name in coded:
        if (weight := header.weight_of(name)) is not None:
            order_(network.get_submodule(name), channels_last=weight.channels_last)
    return network.requires_grad_(False).eval()


def _many_bits(header: Header, tensors: Mapping[str, Tensor], builders: Sequence[Builder]) -> ManyBits:
    """The students of all widths of the file, which share the decoded codes of the widest."""
    entries = {entry_of(bits): int(bits) for bits in header.narrow}
    common = {name: tensor for name, tensor in tensors.items() if name not in entries}
    (most, *_), code = header.widths, (*QUANTIZERS, *admitted_names(builders))
    widest = build_student(header.at(most), common, builders)
    students = {most: widest}
    norms = {name: common[name] for name in norm_entries(common, widest)}
    for entry, bits in entries.items():
        narrow = header.narrow[str(bits)]
        own = _parted(_octets(entry, tensors), norms, header, narrow, code)
        rounded = {name: rounding_of(name) for name in narrow.layers}
        plain = {name: tensor for name, tensor in own.items() if name not in rounded.values()}
        layers = {n: replace(one, input=narrow.layers.get(n, NarrowLayer()).input) for n, one in header.layers.items()}
        like = replace(header, bits=None, narrow={}, inputs=narrow.quantizers, layers=layers)
        student = students[bits] = build_student(like, {**common, **plain}, builders)
        share_(student, widest)
        made: dict[str, Quantizer] = {}
        for name in header.layers:
            layer, wide = student.get_submodule(name), getattr(widest.get_submodule(name), "weight_quantizer", None)
            kind, owner = narrow.layers.get(name, NarrowLayer()).weight, header.layers[name].tied or name
            if kind is not None and wide is not None and owner not in made:
                stored = narrow.quantizers[kind]
                made[owner] = _quantizer(stored, rounding_of(owner), own, code, shape=tuple(wide.spec.shape))
            if wide is not None:
                layer.weight_quantizer = wide if kind is None else made[owner]
    return ManyBits(students).eval()


def _parted(
    octets: Tensor, norms: Mapping[str, Tensor], header: Header, narrow: Narrow, code: Sequence[str]
) -> dict[str, Tensor]:
    """What a width has of its own, by name, from the bytes ``octets``: batch norms like ``norms``, and states."""
    own: dict[str, Tensor] = {}
    at = 0

    def take(name: str, count: int) -> None:
        nonlocal at
        own[name] = octets[at : at + count].clone()
        at += count

    for name, like in norms.items():
        take(name, like.numel() * like.element_size())
    for name in sorted(narrow.layers):
        weight, layer = header.weight_of(name), narrow.layers[name]
        shape = () if weight is None or header.layers[name].tied else weight.shape
        for kind, state, of in (
            (layer.weight if shape else None, rounding_of(name), shape),
            (layer.input, state_of(name), ()),
        ):
            if kind is not None and (bits := _made(narrow.quantizers[kind], code, of).storage_bits()):
                take(state, -(-bits // 8))
    if at != len(octets):
        raise ValueError(f"a width has {len(octets)} bytes of its own, its description says {at}")
    return own | {n: own[n].view(like.dtype).reshape(like.shape) for n, like in norms.items()}


def _swapped_in(network: nn.Module, name: str, *, coded: bool) -> QuantLayer:
    """The quantized form of the layer ``name``, in its place in ``network`` and without quantizers so far.

    ``coded``: its weight comes from codes.
    """
    source = network.get_submodule(name)
    form = LayerSpec("operand") if isinstance(source, Operand) else describe_layer(source)
    if not isinstance(form, LayerSpec):
        raise ValueError(f"layer {name} is a {type(source).__name__}, which has no quantized form")
    layer = quantized_form(source, form)
    if coded and isinstance(layer, QuantConv):
        layer.weight_transform = None  # what is stored is the transformed weight
    if layer is not source:
        replace_module(network, source, layer)
    return layer


def _fill_(network: nn.Module, plain: Mapping[str, Tensor], coded: Collection[nn.Module]) -> None:
    """Give ``network`` the tensors that are stored as they are; what shares a tensor goes on sharing it.

    The weights of the modules ``coded`` are stored as codes. What ``plain`` has a name for is a tensor by itself.
    """
    own = dict(network.named_parameters(remove_duplicate=False)) | dict(network.named_buffers(remove_duplicate=False))
    unnamed: dict[Hashable, list[str]] = {}  # further names of a tensor, which the file does not repeat
    for name in own.keys() - plain.keys():
        unnamed.setdefault(place_of(own[name]), []).append(name)
    for name, tensor in plain.items():
        owner, leaf = _owner(network, name)
        old = own.get(name)
        if old is None and leaf == "bias" and getattr(owner, "bias", tensor) is None:
            owner.bias = nn.Parameter(tensor)  # a batch norm was merged into a layer that had none
            continue
        if old is None or old.shape != tensor.shape or old.is_floating_point() != tensor.is_floating_point():
            has = "nothing" if old is None else f"{old.dtype} of shape {tuple(old.shape)}"
            raise ValueError(f"the network has {has} at {name}, the file {tensor.dtype} of shape {tuple(tensor.shape)}")
        new = nn.Parameter(tensor) if isinstance(old, nn.Parameter) else tensor
        for alias in [name, *unnamed.pop(place_of(old), ())]:
            place, key = _owner(network, alias)
            setattr(place, key, new)
            own[alias] = new
    filled = {place_of(own[name]) for name in plain if name in own}
    for name, tensor in network.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} is a {type(tensor).__name__}; a file has tensors alone")
        if place_of(tensor) in filled or name in plain or name.endswith(COUNTERS):
            continue
        owner, leaf = _owner(network, name)
        if leaf != "weight" or owner not in coded:
            raise ValueError(f"the file lacks {name}, which the network has")


def _owner(network: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    try:
        return network.get_submodule(path), leaf
    except AttributeError as error:
        raise ValueError(f"the network has no module {path}, of which the file has the {leaf}") from error


def _weight(
    stored: StoredWeight,
    tensor: str,
    layer: QuantWeighted,
    tensors: Mapping[str, Tensor],
    code: Sequence[str],
    tied: tuple[nn.Parameter, Stored] | None,
) -> tuple[nn.Parameter, Stored]:
    """The weight as the layer holds it, and the quantizer that knows its codes, which are the entry ``tensor``.

    ``tied`` are those of a layer before that has the same weight.
    """
    shape, expected = layer.weight.shape, tuple(layer.effective_weight().shape)
    if expected != stored.shape:
        raise ValueError(f"{tensor} is a weight of shape {stored.shape}, the network's has {expected}")
    if tied is not None:
        if tied[0].shape != shape:
            raise ValueError(f"{tensor} belongs to layers of different shapes")
        return tied
    like, packed = restore(stored.stored, admitted=code), _octets(tensor, tensors)
    if not isinstance(like, QTensor):
        raise ValueError(f"{tensor} is described as a {type(like).__name__}, not as a stored tensor")
    # A sparse tensor says its own shape, and would take the memory for it before it is compared with the layer's.
    if like.bits != stored.bits or getattr(like, "shape", stored.shape) != stored.shape:
        raise ValueError(f"{tensor} is described in two ways, which do not agree")
    values = values_of(packed, like)
    if isinstance(layer, QuantConvTranspose):
        values = outputs_first(values, layer.groups)  # its own inverse
    if values.shape != shape:
        raise ValueError(f"{tensor} has shape {tuple(values.shape)}, the network's {tuple(shape)}")
    # Into the memory that the weight has: what is freed between what stays is not given back to the system.
    weight = layer.weight.data.copy_(values) if layer.weight.dtype == values.dtype else values
    return nn.Parameter(weight), Stored(like=like, packed=packed, shape=stored.shape, method=stored.quantizer)


def _quantizer(
    stored: StoredInput, state: str, tensors: Mapping[str, Tensor], code: Sequence[str], shape: tuple[int, ...] = ()
) -> Quantizer:
    """The quantizer that ``stored`` describes, for a weight where there is a ``shape``, with its ``state``."""
    quantizer = _made(stored, code, shape)
    packed = _octets(state, tensors).numpy() if quantizer.storage_bits() else b""
    if len(packed) != -(-quantizer.storage_bits() // 8):
        raise ValueError(f"{state} has {len(packed)} bytes, not the {quantizer.storage_bits()} bits of its state")
    quantizer.load_state_(bytes_to_bits(packed))
    return quantizer.eval()


def _made(stored: StoredInput, code: Sequence[str], shape: tuple[int, ...] = ()) -> Quantizer:
    """The quantizer that ``stored`` describes, without its state."""
    make = restore(stored.made_by, admitted=code)
    if not (isinstance(make, partial) and issubclass(make.func, Quantizer)):  # type: ignore[arg-type]
        raise ValueError(f"{stored.quantizer} is not made by a quantizer's constructor")
    spec = QuantSpec(bits=stored.bits, shape=shape, signed=stored.signed, channel_axis=stored.channel_axis)
    quantizer: Quantizer = make(spec=spec)
    quantizer.set_range_(bits=stored.bits, signed=stored.signed)
    quantizer.to(dtype_of(stored.dtype))
    quantizer.made_by = make
    return quantizer


def _octets(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """The bytes that are stored as ``name``, (n,) uint8."""
    found = tensors.get(name)
    if found is None or found.dtype != torch.uint8 or found.ndim != 1:
        raise ValueError(f"the file has no bytes named {name}")
    return found


def _merge_norm_(layer: nn.Module, norm: nn.Module, fixed: Sequence[float] | None) -> None:
    """Let ``layer``, a convolution with a stored weight, divide this by the factors of ``norm``, or by ``fixed``."""
    if not (isinstance(layer, QuantConv) and layer.weight_quantizer is not None and isinstance(norm, _BatchNorm)):
        raise ValueError(f"a {type(norm).__name__} cannot be merged into the weight of a {type(layer).__name__}")
    if fixed is not None and len(fixed) != norm.num_features:
        raise ValueError(f"{len(fixed)} factors do not fit a norm of {norm.num_features} channels")
    factors = None if fixed is None else torch.tensor(fixed).to(layer.weight)
    layer.weight_transform = FoldedWeight(norm=norm, fixed=factors, merged=True)
