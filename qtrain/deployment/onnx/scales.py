"""Scales of inputs with which a runtime needs no operation in floating point before or behind the codes.

A ReLU6 in front of codes that reach beyond 6 stays in the file as an operation; where the top code is 6, there is none.
A hard sigmoid of codes whose scale is a whole part of 3 is a clip of codes that are read with another scale. So scales
are moved to such values before the student is tested and kept: the file then is the student.
"""

import logging
from collections.abc import Iterator

import torch
from torch import fx, nn

from qtrain.convert.graph import called, calls, trace
from qtrain.convert.layers import quant_layers
from qtrain.deployment.onnx.forms import Codes, NoFormError, gate_steps, input_codes
from qtrain.models.norms import NormForm, describe_norm
from qtrain.nn import Operand, QuantLayer
from qtrain.nn.operations import HARD_GATES, Applied
from qtrain.quantizers.base import Quantizer
from qtrain.quantizers.hooks import Rescalable
from qtrain.quantizers.wrappers.wrapper import innermost
from qtrain.utils.calls import first_argument

log = logging.getLogger(__name__)

_LEAST, _MOST = 0.9, 2.0
"""Factors by which the scale of a hard swish's input may change; a wider scale costs codes."""

_KEEPS_VALUES = (Operand, nn.Identity, nn.Dropout, nn.Dropout2d, nn.MaxPool2d)


@torch.no_grad()
def settle_tops_(student: nn.Module) -> list[str]:
    """Let the top code be ``c`` where an activation that ends at ``c``, ReLU6 or Hardtanh(0, c), feeds a quantizer.

    A scale, learned or observed, whose top code is above ``c`` becomes ``c / (2^b - 1)``. Returns the names of the
    layers whose scale changed.
    """
    try:
        graph = trace(student)
    except ValueError as error:
        log.info("scales behind a ReLU6 stay as they are: %s", error)
        return []
    names = {layer: name for name, layer in quant_layers(student).items()}
    readers: dict[Quantizer, list[tuple[str, float | None]]] = {}
    for node, layer in calls(graph):
        if isinstance(layer, QuantLayer) and (quantizer := layer.tensor_quantizer or layer.input_quantizer) is not None:
            end = _end(graph, first_argument(node.args, node.kwargs))
            readers.setdefault(quantizer, []).append((names[layer], end))
    settled: dict[str, None] = {}
    for quantizer, found in readers.items():
        ends = [end for _, end in found if end is not None]
        codes = _codes(quantizer)
        if len(ends) < len(found) or codes is None or bool(codes.zero_point):
            continue
        top = codes.high * float(codes.scale)
        if top > max(ends) and _rescale_(quantizer, max(ends) / top):
            settled |= dict.fromkeys(name for name, _ in found)
    return list(settled)


@torch.no_grad()
def settle_gates_(student: nn.Module) -> tuple[list[str], list[str]]:
    """Make 3, where a hard sigmoid ends, a whole number of steps of what hard sigmoids and hard swishes read.

    Returns the names of those for which it is one now, and of the others: their range is too narrow, has no codes below
    -3, or is not that of one scale.
    """
    settled: tuple[list[str], list[str]] = ([], [])
    for name, module in student.named_modules():
        if isinstance(module, Applied) and module.function_name in HARD_GATES:
            quantizer = module.input.input_quantizer
            if quantizer is not None and quantizer.enabled:
                settled[0 if settle_gate_(quantizer, swish=module.function_name == "hardswish") else 1].append(name)
    return settled


def settle_gate_(quantizer: Quantizer, *, swish: bool) -> bool:
    """:func:`settle_gates_` for the one input of a hard sigmoid, or of a hard swish; whether it could be done."""
    codes = _codes(quantizer)
    if codes is None or not int(codes.zero_point):
        return False
    if gate_steps(codes) is not None:
        return True
    steps = min(max(round(3 / float(codes.scale)), 1), int(codes.zero_point))
    factor = 3 / steps / float(codes.scale)
    # The codes of a gate alone are finer than 1/256 whatever the factor.
    if not _LEAST <= factor <= (_MOST if swish else torch.inf):
        return False
    before = {key: value.clone() for key, value in quantizer.state_dict().items()}
    if _rescale_(quantizer, factor) and (codes := _codes(quantizer)) is not None and gate_steps(codes) is not None:
        return True
    quantizer.load_state_dict(before)
    return False


def _rescale_(quantizer: Quantizer, factor: float) -> bool:
    core = innermost(quantizer)
    if not isinstance(core, Rescalable):
        return False
    core.rescale_(torch.full(core.state_shape, factor, device=core.bits.device))
    return True


def _codes(quantizer: Quantizer) -> Codes | None:
    """The codes of ``quantizer`` where they have one scale and nothing else."""
    try:
        codes = input_codes(quantizer) if quantizer.enabled else None
    except NoFormError:
        return None
    plain = codes is not None and codes.axis is None and codes.offset is None and codes.threshold is None
    return codes if plain else None


def _end(graph: fx.GraphModule, value: object) -> float | None:
    """Where the activation ends, from 0, whose values ``value`` has."""
    while isinstance(value, fx.Node):
        module = called(graph, value)
        if isinstance(module, _KEEPS_VALUES) or (module is None and _name(value).startswith("max_pool")):
            value = first_argument(value.args, value.kwargs)
            continue
        if module is None:
            low, high = (*_bounds(value), None, None)[:2]
        else:
            form = describe_norm(module)
            *_, last = form.rest.modules() if isinstance(form, NormForm) else [module]
            low, high = (last.min_val, last.max_val) if isinstance(last, nn.Hardtanh) else (None, None)
        return float(high) if isinstance(high, int | float) and low == 0 else None
    return None


def _name(node: fx.Node) -> str:
    return str(node.target if node.op == "call_method" else getattr(node.target, "__name__", "")).rstrip("_")


def _bounds(node: fx.Node) -> Iterator[object]:
    """The lower and the upper end of a function of torch that clips."""
    if _name(node) == "relu6":
        yield from (0.0, 6.0)
    elif _name(node) in ("hardtanh", "clamp", "clip"):
        ends = dict(zip(("min", "max"), node.args[1:], strict=False))
        for end in ("min", "max"):
            yield ends.get(end, node.kwargs.get(end, node.kwargs.get(f"{end}_val")))
