"""What conversion did to a network besides swapping its layers: found by comparison, and done again to a new one."""

from collections.abc import Sequence

import torch
from torch import nn

from qtrain.convert.operation_nodes import KINDS
from qtrain.convert.operations import insert_operations_
from qtrain.convert.own_forward import GIVEN
from qtrain.convert.replace import replace_module
from qtrain.models.layer_kinds import merge_fused_biases
from qtrain.models.norms import describe_norm
from qtrain.nn.folded import FoldedWeight
from qtrain.nn.operations import Operation
from qtrain.nn.stored import stored_parts
from qtrain.packed.header import Structure, dtype_of


def structure_of(student: nn.Module, network: nn.Module) -> Structure:
    """How ``student`` differs from ``network``, which is built as the student was before it was converted.

    Batch norms that the student lacks are taken out of ``network``.
    """
    parts = stored_parts(student)
    theirs = dict(student.named_modules(remove_duplicate=False))
    own = dict(network.named_modules(remove_duplicate=False))
    names = {module: name for name, module in student.named_modules()}
    dtypes = {parameter.dtype for parameter in student.parameters()}
    exposed = {
        n: m.kind for n, m in theirs.items() if isinstance(m, Operation) and not isinstance(own.get(n), Operation)
    }
    folded = tuple(n for n, m in own.items() if describe_norm(m) is not None and _is_gone(theirs.get(n)))
    _fold_(network, folded)
    left = dict(network.named_modules(remove_duplicate=False))
    return Structure(
        folded=folded,
        relu=tuple(n for n, m in left.items() if type(m) is nn.ReLU6 and type(theirs.get(n)) is nn.ReLU),
        operations=tuple(kind for kind in KINDS if kind in exposed.values()),
        exposed=tuple(dict.fromkeys(name if name in own else name.rpartition(".")[0] for name in exposed)),
        given={
            n: found for n, m in theirs.items() if (found := vars(m).get(GIVEN)) and GIVEN not in vars(own.get(n, m))
        },
        merged_norms={
            name: names[transform.norm]
            for name, module in student.named_modules()
            if isinstance(transform := getattr(module, "weight_transform", None), FoldedWeight)
        },
        fixed_factors={
            name: tuple(transform.fixed.tolist())
            for name, module in student.named_modules()
            if isinstance(transform := getattr(module, "weight_transform", None), FoldedWeight)
            and transform.fixed is not None
        },
        shared_inputs=parts.shared_inputs,
        tensors=parts.tensors,
        fused_biases=any(
            getattr(m, "q_bias", None) is not None and getattr(theirs.get(n), "q_bias", None) is None
            for n, m in own.items()
        ),
        channels_last=_is_channels_last(student),
        dtype=str(dtypes.pop()).removeprefix("torch.") if len(dtypes) == 1 else None,
    )


def restructure_(network: nn.Module, structure: Structure) -> None:
    """Change ``network``, newly built, as conversion changed the student's; its weights do not matter.

    Raises ``ValueError`` where it has not the modules that ``structure`` names.
    """
    if structure.fused_biases:
        merge_fused_biases(network)
    _fold_(network, structure.folded)
    for name in structure.relu:
        replace_module(network, network.get_submodule(name), nn.ReLU())
    if structure.operations:
        insert_operations_(network, structure.operations, among=structure.exposed, given=structure.given)
    if structure.dtype is not None:
        _cast_(network, dtype_of(structure.dtype))


def _cast_(network: nn.Module, dtype: torch.dtype) -> None:
    """Give the parameters ``dtype``, and the buffers that have the parameters' type now; others have a type of their
    own, such as complex factors."""
    types = {parameter.dtype for parameter in network.parameters()}
    for module in network.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and buffer.dtype in types:
                setattr(module, name, buffer.to(dtype))


def _fold_(network: nn.Module, norms: Sequence[str]) -> None:
    """Leave of each of the ``norms`` only its activation, if it has one."""
    for name in norms:
        norm = network.get_submodule(name)
        form = describe_norm(norm)
        if form is None or isinstance(form, str):
            raise ValueError(f"{name} is a {type(norm).__name__}, not the batch norm that was merged")
        replace_module(network, norm, form.rest)


def _is_gone(norm: nn.Module | None) -> bool:
    return norm is None or describe_norm(norm) is None


def _is_channels_last(model: nn.Module) -> bool:
    """Whether a kernel of ``model`` has its channels last in memory, and not only because both orders are the same."""
    return any(
        parameter.ndim == 4
        and parameter.is_contiguous(memory_format=torch.channels_last)
        and not parameter.is_contiguous()
        for parameter in model.parameters()
    )
