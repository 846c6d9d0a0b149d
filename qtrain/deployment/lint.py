"""What a target will not compute with integers, layer by layer, known before anything is trained."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qtrain.convert.layers import quant_layers
from qtrain.convert.target import Target
from qtrain.deployment.onnx.forms import NoFormError, input_codes
from qtrain.deployment.onnx.lowering import norms_of, weight_of
from qtrain.deployment.onnx.scales import settle_gate_
from qtrain.deployment.onnx.weights import weight_codes
from qtrain.deployment.steps import BOUND, MOVE, Step, steps_of
from qtrain.models.norms import NormForm
from qtrain.nn import Operand, QuantConvTranspose, QuantLinear, QuantWeighted
from qtrain.nn.operations import HARD_GATES, Applied, Operation
from qtrain.utils.calls import see_input
from qtrain.utils.eval_mode import evaluating
from qtrain.utils.processor import saturates_in_16_bits

NETWORK = "the network"
"""How a finding calls the network's own forward."""

_KEEPS_CODES = ("matmul", "max_pool")
"""Kinds that are computed with integers wherever they read codes; of a product the sums may be read as they are."""

WIDE = 8
"""Bits of weights with which pairs of products need more than 16 bits."""


@dataclass(frozen=True)
class Finding:
    """What happens to ``layer`` in the runtime, and why.

    ``float``: computed in floating point. ``size only``: computed in more bits than it is stored in. ``refused``: it
    has no form there. ``saturates``: this processor adds its products in too few bits. ``unknown``: its forward cannot
    be looked into.
    """

    layer: str
    effect: Literal["float", "size only", "refused", "saturates", "unknown"]
    reason: str

    def __str__(self) -> str:
        return f"{self.layer}: {self.effect}: {self.reason}"


def lint(
    student: nn.Module, target: Target, example: Tensor, skipped: Mapping[str, str] | None = None
) -> list[Finding]:
    """What of ``student``, calibrated, ``target`` does not compute with the integers that it is stored in.

    ``example`` (N, C, H, W) shows how many axes the tensors have. ``skipped`` are layers that conversion left out, with
    the reasons.
    """
    layers = {name: layer for name, layer in quant_layers(student).items() if not isinstance(layer, Operand)}
    norms = {name: form for name, (_, form) in norms_of(student, quiet=True)}
    found = [Finding(name, "float", reason) for name, reason in (skipped or {}).items()]
    for name, layer in layers.items():
        found += _layer(name, layer, norms.get(name), target)
    steps, axes = steps_of(student), _axes(student, layers, example)
    found += [
        Finding(name or NETWORK, "unknown", f"what it computes: {reason}") for name, reason in steps.unknown.items()
    ]
    said = {one.layer for one in found if one.effect in ("float", "refused")}
    for step in steps.steps:
        if step.name in layers:
            reason = None if step.name in said else _reads_and_gives(step, layers[step.name], axes[step.name], target)
        else:
            reason = None if step.name in (skipped or {}) else _operation(step, student, target)
        if reason is not None:
            found.append(Finding(step.name or NETWORK, "float", reason))
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
    return list(dict.fromkeys(found))


def summary(found: list[Finding], student: nn.Module, target: Target) -> str:
    """One line about ``found``."""
    outside = [one for one in found if one.effect in ("float", "refused")]
    left = {one.layer for one in outside}
    places = {name for name, module in student.named_modules() if isinstance(module, Operation | QuantWeighted)}
    line = f"target {target.name}: {len(places - left)} of {len(places | left)} layers and operations in integers"
    if outside:
        line += f"; {len(outside)} not, the first {outside[0]}"
    small = sum(one.effect == "size only" for one in found)
    return line + (f"; {small} with bits that only shorten the file" if small else "")


def _layer(name: str, layer: QuantWeighted, norm: NormForm | None, target: Target) -> Iterator[Finding]:
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
    if isinstance(reason := weight_of(layer, norm), str):
        yield Finding(name, "float", reason)
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


def _reads_and_gives(step: Step, layer: QuantWeighted, axes: int, target: Target) -> str | None:
    """Why ``layer``, which has codes itself, is computed in floating point by what stands around it."""
    if isinstance(layer, QuantConvTranspose) and (reason := target.layers_in_float.get("conv_transpose")) is not None:
        return reason
    if isinstance(layer, QuantLinear):  # its sums may be read in floating point
        reason = target.layers_in_float.get("bias_of_many_axes") if axes > 2 and layer.bias is not None else None
        return None if reason is None else f"its bias: {reason}"
    return _read_in_float(step, target)


def _operation(step: Step, student: nn.Module, target: Target) -> str | None:
    """Why ``step``, which is no layer, is computed in floating point."""
    reason = _why(step, student, target, kind=step.kind or "")
    return None if reason is None else f"{step.title}: {reason}"


def _why(step: Step, student: nn.Module, target: Target, *, kind: str) -> str | None:
    if kind == BOUND:
        return _read_in_float(step, target)
    if kind == MOVE:
        return "what it reads is not quantized"
    if kind == "norm" or kind not in target.operations:
        alone = "no quantized layer directly before it" if isinstance(step.module, _BatchNorm) else "no integer kernel"
        return target.in_float.get(kind, alone)
    if kind in target.in_float and step.title not in target.integer_functions:
        return target.in_float[kind]
    if not step.reads_codes:
        return "not all that it works on is quantized"
    operation = student.get_submodule(step.name)
    if isinstance(operation, Applied) and step.title in HARD_GATES:
        quantizer = copy.deepcopy(operation.input.input_quantizer)
        if quantizer is not None and not settle_gate_(quantizer, swish=step.title == "hardswish"):
            return "3 cannot be a whole number of steps of what it reads"
    return None if kind in _KEEPS_CODES or step.title == "hardsigmoid" else _read_in_float(step, target)


def _read_in_float(step: Step, target: Target) -> str | None:
    if not target.between_codes or step.read_by is None:
        return None
    return f"what it gives is not quantized at once, but read by {step.read_by}"


def _axes(student: nn.Module, layers: Mapping[str, nn.Module], example: Tensor) -> dict[str, int]:
    """How many axes the inputs of ``layers`` have."""
    found: dict[str, int] = dict.fromkeys(layers, 0)

    def see(name: str, x: Tensor) -> None:
        found[name] = x.ndim

    with ExitStack() as hooks, evaluating(student), torch.no_grad():
        for name, layer in layers.items():
            hooks.enter_context(see_input(layer, partial(see, name)))
        student(example)
    return found
