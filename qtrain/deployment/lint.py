"""What a target will not compute with integers, layer by layer, known before anything is trained."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from qtrain.convert.fold import foldable
from qtrain.convert.graph import Skipped
from qtrain.convert.layers import quant_layers
from qtrain.convert.target import Target
from qtrain.deployment.onnx.forms import NoFormError, input_codes
from qtrain.deployment.onnx.scales import settle_gate_
from qtrain.deployment.onnx.weights import weight_codes
from qtrain.nn import Operand, QuantWeighted
from qtrain.nn.operations import HARD_GATES, Applied, Operation
from qtrain.utils.processor import saturates_in_16_bits

WIDE = 8
"""Bits of weights with which pairs of products need more than 16 bits."""


@dataclass(frozen=True)
class Finding:
    """What happens to ``layer`` in the runtime, and why.

    ``float``: computed in floating point. ``size only``: computed in more bits than it is stored in. ``refused``: it
    has no form there. ``saturates``: this processor adds its products in too few bits.
    """

    layer: str
    effect: Literal["float", "size only", "refused", "saturates"]
    reason: str

    def __str__(self) -> str:
        return f"{self.layer}: {self.effect}: {self.reason}"


def lint(student: nn.Module, target: Target, skipped: Mapping[str, str] | None = None) -> list[Finding]:
    """What of ``student``, calibrated, ``target`` does not compute with the integers that it is stored in.

    ``skipped`` are layers that conversion left out, with the reasons.
    """
    layers = {name: layer for name, layer in quant_layers(student).items() if not isinstance(layer, Operand)}
    found = [Finding(name, "float", reason) for name, reason in (skipped or {}).items()]
    for name, layer in layers.items():
        found += _layer(name, layer, target)
    found += _operations(student, target)
    found += _norms(student)
    if saturates_in_16_bits() and any(
        layer.weight_quantizer is not None and int(layer.weight_quantizer.bits) >= WIDE for layer in layers.values()
    ):
        found.append(
            Finding(
                "weights of 8 bits",
                "saturates",
                "this processor has no VNNI and adds pairs of their products in 16 bits; 7-bit weights do not need "
                "more, and ONNX Runtime sums exactly with session.x64quantprecision=1, which run.py sets",
            )
        )
    return found


def summary(found: list[Finding], student: nn.Module, target: Target) -> str:
    """One line about ``found``."""
    places = sum(isinstance(module, Operation | QuantWeighted) for module in student.modules())
    outside = [one for one in found if one.effect in ("float", "refused")]
    line = f"target {target.name}: {places - min(places, len(outside))} of {places} layers and operations in integers"
    if outside:
        line += f"; {len(outside)} not, the first {outside[0]}"
    small = sum(one.effect == "size only" for one in found)
    return line + (f"; {small} with bits that only shorten the file" if small else "")


def _layer(name: str, layer: QuantWeighted, target: Target) -> Iterator[Finding]:
    weight, inputs = layer.weight_quantizer, layer.input_quantizer
    if weight is None or inputs is None:
        what = "weight" if weight is None else "input"
        yield Finding(name, "float", f"its {what} has no bits")
        return
    try:
        codes = input_codes(inputs)
    except NoFormError as error:
        yield Finding(name, "refused", f"its input has no form in ONNX: {error}")
        return
    if weight_codes(weight.quantize(layer.effective_weight())) is None:
        yield Finding(name, "float", f"weights of {type(weight).__name__} are not evenly spaced; the file has values")
        return
    if codes.offset is not None or codes.axis is not None:
        yield Finding(name, "float", "its input has an offset or a scale for each channel")
        return
    if codes.threshold is not None:
        yield Finding(name, "float", "its input is a sign, which it multiplies in floating point")
        return
    small = []
    for what, bits, widths in (
        ("weights", int(weight.bits), target.weight_bits),
        ("inputs", int(inputs.bits), target.input_bits),
    ):
        wider = [width for width in widths if width >= bits]
        if not wider:
            yield Finding(name, "float", f"{what} of {bits} bits are more than the {max(widths)} that it computes with")
            return
        if min(wider) > bits:
            small.append(f"{what} of {bits} bits are computed in {min(wider)}")
    if small:
        yield Finding(name, "size only", ", ".join(small))


def _operations(student: nn.Module, target: Target) -> Iterator[Finding]:
    for name, operation in student.named_modules():
        if not isinstance(operation, Operation) or (reason := target.in_float.get(operation.kind)) is None:
            continue
        title = operation.function_name if isinstance(operation, Applied) else operation.kind
        if title not in target.integer_functions:
            yield Finding(name, "float", f"{title}: {reason}")
        elif isinstance(operation, Applied) and title in HARD_GATES:
            quantizer = copy.deepcopy(operation.input.input_quantizer)
            if quantizer is not None and not settle_gate_(quantizer, swish=title == "hardswish"):
                yield Finding(name, "float", f"{title}: 3 cannot be a whole number of steps of what it reads")


def _norms(student: nn.Module) -> Iterator[Finding]:
    """Modules with parameters that are no layers of the target: norms that no layer takes in, scales of layers."""
    merged: set[str] = set()
    if any(isinstance(module, _BatchNorm) for module in student.modules()):
        try:
            merged = {norm for _, _, norm, _ in foldable(student, "lint", Skipped("stays a layer of its own"))}
        except ValueError:
            merged = set()
    for name, module in student.named_modules():
        own = any(True for _ in module.parameters(recurse=False))
        quantized = any(part in name for part in ("_quantizer", "weight_transform"))
        if own and not quantized and name not in merged and not isinstance(module, QuantWeighted):
            kind = type(module).__name__
            reason = "no quantized layer directly before it" if isinstance(module, _BatchNorm) else "no integer kernel"
            yield Finding(name or "the network's own parameters", "float", f"{kind}: {reason}")
