"""A student from its file alone: no config, no data set, and no code from the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from qtrain.convert.swap import quantized_form, replace_module
from qtrain.export.header import Header, StoredInput, StoredLayer, StoredWeight, dtype_of, read
from qtrain.export.networks import Builder, build_network
from qtrain.export.structure import restructure_
from qtrain.models.layer_kinds import LayerSpec, describe_layer
from qtrain.nn import Operand, QuantConv, QuantConvTranspose, QuantWeighted
from qtrain.nn.conv_transpose import outputs_first
from qtrain.nn.folded import FoldedWeight
from qtrain.nn.stored import COUNTERS
from qtrain.quantizers.base import Quantizer
from qtrain.quantizers.stored import Stored, values_of
from qtrain.spec import QuantSpec
from qtrain.storage.base import QTensor
from qtrain.storage.bits import bytes_to_bits
from qtrain.storage.description import VALUES, restore

QUANTIZERS = (*VALUES, "qtrain.quantizers", "qtrain.schedules")
"""Where the classes of a file's quantizers are defined."""


def load_student(path: Path | str, *, builders: Sequence[Builder] = ()) -> nn.Module:
    """The student of the file at ``path``: a network in eval mode on the CPU, whose weights do not train.

    Its logits equal those of the student that was saved, bit for bit on the same machine. Code outside of qtrain and
    timm, of a network or quantizer of one's own, is imported only where ``builders`` names it: a class or function, its
    dotted name, or its package. Raises ``FileNotFoundError`` where there is no file, and ``ValueError`` with one line
    where the file is truncated, foreign, changed or newer, or names code that was not admitted.

    >>> import qtrain, timm, torch
    >>> images = torch.rand(2, 3, 32, 32)
    >>> student = qtrain.quantize(timm.create_model("resnet10t", num_classes=4), images)
    >>> _ = qtrain.save(student, "student.safetensors")
    >>> torch.equal(qtrain.load("student.safetensors")(images), student(images))
    True
    """
    header, tensors = read(path)
    try:
        return build_student(header, tensors, builders)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} cannot be loaded: {reason}") from error


@torch.no_grad()
def build_student(header: Header, tensors: Mapping[str, Tensor], builders: Sequence[Builder] = ()) -> nn.Module:
    """The student that ``header`` and ``tensors`` describe. Raises ``ValueError`` where they do not fit together."""
    network = build_network(header.network, builders)
    restructure_(network, header.structure)
    coded = {layer.weight.tensor for layer in header.layers.values() if layer.weight is not None}
    states = {layer.input.tensor for layer in header.layers.values() if layer.input is not None}
    replaced = {f"{name}.weight" for name, layer in header.layers.items() if layer.weight is not None}
    _fill_(network, {name: t for name, t in tensors.items() if name not in coded | states}, replaced)
    code = (*QUANTIZERS, *(builder for builder in builders if isinstance(builder, str)))
    shared: dict[str, tuple[nn.Parameter, Stored]] = {}
    for name, layer in header.layers.items():
        _restore_layer_(network, name, layer, tensors, shared, code)
    for name, norm in header.structure.merged_norms.items():
        transform = FoldedWeight(norm=network.get_submodule(norm), merged=True)  # type: ignore[arg-type]
        network.get_submodule(name).weight_transform = transform
    if header.structure.channels_last:
        network.to(memory_format=torch.channels_last)
    return network.requires_grad_(False).eval()


def _fill_(network: nn.Module, plain: Mapping[str, Tensor], replaced: set[str]) -> None:
    """Give ``network`` the tensors that are stored as they are; what shares a tensor goes on sharing it."""
    own = dict(network.named_parameters(remove_duplicate=False)) | dict(network.named_buffers(remove_duplicate=False))
    for name, tensor in plain.items():
        owner, leaf = _owner(network, name)
        old = own.get(name)
        if old is None and leaf == "bias" and owner._parameters.get("bias", 0) is None:
            owner.bias = nn.Parameter(tensor)  # a batch norm was merged into a layer that had none
            continue
        if old is None or old.shape != tensor.shape:
            has = "nothing" if old is None else f"shape {tuple(old.shape)}"
            raise ValueError(f"the network has {has} at {name}, the file a tensor of shape {tuple(tensor.shape)}")
        new = nn.Parameter(tensor) if isinstance(old, nn.Parameter) else tensor
        for alias in [key for key, value in own.items() if value is old]:
            place, key = _owner(network, alias)
            setattr(place, key, new)
            own[alias] = new
    filled = {id(own[name]) for name in plain if name in own}
    for name, tensor in network.state_dict(keep_vars=True).items():
        if id(tensor) not in filled and name not in {*plain, *replaced} and not name.endswith(COUNTERS):
            raise ValueError(f"the file lacks {name}, which the network has")


def _owner(network: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    try:
        return network.get_submodule(path), leaf
    except AttributeError as error:
        raise ValueError(f"the network has no module {path}, of which the file has the {leaf}") from error


def _restore_layer_(
    network: nn.Module,
    name: str,
    stored: StoredLayer,
    tensors: Mapping[str, Tensor],
    shared: dict[str, tuple[nn.Parameter, Stored]],
    code: Sequence[str],
) -> None:
    source = network.get_submodule(name)
    form = LayerSpec("operand") if isinstance(source, Operand) else describe_layer(source)
    if not isinstance(form, LayerSpec):
        raise ValueError(f"layer {name} is a {type(source).__name__}, which has no quantized form")
    layer = quantized_form(source, form)
    if stored.weight is not None:
        if isinstance(layer, Operand):
            raise ValueError(f"layer {name} has no weight, the file has one")
        if stored.weight.tensor not in shared:
            shared[stored.weight.tensor] = _weight(stored.weight, layer, tensors)
        layer.weight, layer.weight_quantizer = shared[stored.weight.tensor]
        if isinstance(layer, QuantConv):
            layer.weight_transform = None  # what is stored is the transformed weight
    if stored.input is not None:
        layer.input_quantizer = _input_quantizer(stored.input, tensors, code)
    if layer is not source:
        replace_module(network, source, layer)


def _weight(stored: StoredWeight, layer: QuantWeighted, tensors: Mapping[str, Tensor]) -> tuple[nn.Parameter, Stored]:
    """The weight as the layer holds it, and the quantizer that knows its codes."""
    like, packed = restore(stored.stored), tensors[stored.tensor]
    if not isinstance(like, QTensor):
        raise ValueError(f"{stored.tensor} is described as a {type(like).__name__}, not as a stored tensor")
    values = values_of(packed, like)
    if isinstance(layer, QuantConvTranspose):
        values = outputs_first(values, layer.groups)  # its own inverse
    if values.shape != layer.weight.shape:
        raise ValueError(f"{stored.tensor} has shape {tuple(values.shape)}, the network's {tuple(layer.weight.shape)}")
    return nn.Parameter(values), Stored(like=like, packed=packed, shape=stored.shape, method=stored.quantizer)


def _input_quantizer(stored: StoredInput, tensors: Mapping[str, Tensor], code: Sequence[str]) -> Quantizer:
    make = restore(stored.made_by, admitted=code)
    spec = QuantSpec(bits=stored.bits, signed=stored.signed, channel_axis=stored.channel_axis)
    quantizer = make(spec=spec)
    if not isinstance(quantizer, Quantizer):
        raise ValueError(f"{stored.quantizer} is a {type(quantizer).__name__}, not a quantizer")
    quantizer.set_range_(bits=stored.bits, signed=stored.signed)
    quantizer.to(dtype_of(stored.dtype))
    stream = bytes_to_bits(b"" if stored.tensor is None else tensors[stored.tensor].numpy())
    quantizer.load_state_(stream)
    quantizer.made_by = make
    return quantizer.eval()
