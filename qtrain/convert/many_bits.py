"""Joining students of several widths to one model that has their weights once."""

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from qtrain.convert.layers import quant_layers
from qtrain.nn.many_bits import ManyBits
from qtrain.quantizers.base import Quantizer
from qtrain.quantizers.requantized import Requantized
from qtrain.quantizers.wrappers.wrapper import TrainingWrapper, Wrapper


@torch.no_grad()
def join(students: Mapping[int, nn.Module]) -> ManyBits:
    """One model of the ``students``, by their width, that were converted from one network and calibrated.

    All but the widest give up their own parameters for those of the widest; batch norms and quantizers they keep.
    Their weight quantizers get what the widest student's give (:class:`Requantized`), and where a layer has the same
    weight bits in both, they have one quantizer. Raises ``ValueError`` where the students have other weights, or layers
    in full precision in one and not in the other, or where a quantizer's values need more than its own few numbers.
    """
    joined = ManyBits(students)
    widest, *others = joined.students.values()
    for student in others:
        share_(student, widest)
        made: dict[Quantizer, Quantizer] = {}
        for name, layer in quant_layers(student).items():
            own, wide = layer.weight_quantizer, getattr(widest.get_submodule(name), "weight_quantizer", None)
            if own is None and wide is None:
                continue
            if own is None or wide is None:
                raise ValueError(
                    f"many_bits: layer {name!r} has a weight in full precision at one width and a quantized one at "
                    "another, and their codes are to be shared"
                )
            _check_kind(own)
            if own not in made:
                same = int(own.bits) == int(wide.bits)
                made[own] = wide if same else Requantized(inner=own, first=wide)
            layer.weight_quantizer = made[own]
    return joined


def share_(student: nn.Module, widest: nn.Module) -> None:
    """Give ``student`` the parameters and buffers of ``widest``, except those of batch norms and quantizers.

    Raises ``ValueError`` where the two have not the same.
    """
    for name, module in student.named_modules():
        if isinstance(module, _BatchNorm) or _in_quantizer(student, name):
            continue
        theirs = widest.get_submodule(name)
        for own, shared in ((module._parameters, theirs._parameters), (module._buffers, theirs._buffers)):
            for key, tensor in own.items():
                other = shared.get(key)
                if (tensor is None) != (other is None) or (tensor is not None and not torch.equal(tensor, other)):  # type: ignore[arg-type]
                    raise ValueError(
                        f"many_bits: {f'{name}.{key}'.lstrip('.')} differs between the widths, and is to be shared"
                    )
            own.update(shared)


def _check_kind(quantizer: Quantizer) -> None:
    """Raise ``ValueError`` unless the values of ``quantizer`` follow from a weight of more bits and a few numbers."""
    core: nn.Module = quantizer
    while isinstance(core, TrainingWrapper):
        core = core.inner
    if isinstance(core, Wrapper) or (isinstance(core, Quantizer) and "input" not in core.serves):
        raise ValueError(
            f"many_bits: {type(core).__name__} keeps tables or masks for one width, and a file of many bits has only "
            "the codes of the most bits; take lsq for quantize.weight, or another that quantizes inputs too"
        )


def _in_quantizer(student: nn.Module, name: str) -> bool:
    parts = name.split(".")
    return any(isinstance(student.get_submodule(".".join(parts[: i + 1])), Quantizer) for i in range(len(parts)))
