"""Biases that a runtime of integers can store as they are.

It adds a bias to sums of products, so the bias has to be a whole number of steps ``s_x s_w``, the product of the scales
of input and weight. Rounding any other bias moves all values of its channel, some of them over a rounding boundary, and
the runtime computes something else than what was trained. So biases are rounded before the student is tested and kept.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qtrain.deployment.onnx.lowering import bias_with, lower, norms_of
from qtrain.models.norms import NormForm
from qtrain.utils.eval_mode import evaluating
from qtrain.utils.sharing import shared_tensors, why_shared


@torch.no_grad()
def round_biases_(student: nn.Module) -> list[str]:
    """Round the biases of ``student`` in place, each by at most half a step; returns the names of the layers.

    Where a batch norm follows, its shift takes the difference, so that the sum of all that is added is rounded. Layers
    stay as they are where nothing of their own can take it: a bias that several layers share, a norm without a shift.
    Raises ``ValueError`` where an input has no form in ONNX.
    """
    with evaluating(student):
        coded = lower(student).biases
        norms = dict(norms_of(student))
    shared = shared_tensors(student)
    rounded = []
    for name, place, parameter, bias in _places(student, coded.keys(), norms):
        if why_shared(shared, place, "bias") is not None:
            continue
        codes = coded[name]
        change = codes.codes.double() * codes.scale.double() - bias.double().cpu()
        parameter.copy_((parameter.double().cpu() + change).to(parameter))
        rounded.append(name)
    return rounded


def _places(
    student: nn.Module, names: Iterable[str], norms: Mapping[str, tuple[str, NormForm]]
) -> Iterator[tuple[str, str, Tensor, Tensor]]:
    """(layer, module that takes the difference, its bias, all that is added (O,)) of the layers ``names``."""
    for name in names:
        layer: Any = student.get_submodule(name)
        norm = norms.get(name)
        place = name if norm is None else norm[0]
        parameter = getattr(student.get_submodule(place), "bias", None)
        bias = bias_with(layer, None if norm is None else norm[1])
        if isinstance(parameter, Tensor) and bias is not None:
            yield name, place, parameter, bias
