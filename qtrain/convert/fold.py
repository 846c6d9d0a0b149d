"""Batch norm merged into the layer before it: permanently before training, or in training only for the rounding.

In eval mode a batch norm is ``scale y + shift``, and with ``y = W x + b`` the two are one layer, ``(scale W) x + (scale
b + shift)`` (Jacob et al. 2018, arXiv 1712.05877, §3.2). A quantized model that is deployed computes that layer, so its
weights should be rounded as they are there.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from qtrain.convert.graph import Skipped, called, called_once, calls, trace
from qtrain.convert.replace import replace_module
from qtrain.models.layer_kinds import LayerSpec, describe_layer
from qtrain.models.norms import NormForm, describe_norm
from qtrain.nn import QuantConv, QuantConvTranspose, QuantLinear
from qtrain.nn.conv_transpose import outputs_first
from qtrain.nn.folded import FoldedWeight, fixed_factors
from qtrain.utils.calls import first_argument, see_input
from qtrain.utils.compat import has_hooks
from qtrain.utils.eval_mode import evaluating
from qtrain.utils.sharing import shared_tensors, why_shared

ANOTHER_AXIS = "it normalizes another axis than that of the layer's outputs"


@dataclass
class OutputStatistics:
    """Mean and standard deviation, (C,) float32 each, of each channel of a layer's output over the training data.

    They are known from a batch norm that was merged into the layer: ``mean = beta`` and ``std = |gamma| sqrt(var / (var
    + eps))``. Equalization scales them together with the outputs.
    """

    mean: Tensor
    std: Tensor


@torch.no_grad()
def fold_batchnorm_(model: nn.Module, example: Tensor) -> dict[str, OutputStatistics]:
    """Merge every batch norm of ``model`` that directly follows a convolution or linear layer into it, in place.

    Of timm's fused batch norm the activation remains. The function in eval mode stays the same. A norm that cannot be
    merged is logged with the reason. Returns the output statistics by the layer's qualified name, for the layers whose
    norms were trained. Raises ``ValueError`` where there is no batch norm, and where the output on noise of the shape
    of ``example`` (N, C, H, W) changes by more than rounding errors.
    """
    expected = output_on_noise(model, example)
    shared, axes = shared_tensors(model), _axes(model, example)
    statistics, skipped = {}, Skipped("batch norm is not folded")
    for layer_name, layer, norm_name, form in foldable(model, "quantize.fold=before", skipped):
        reason = _no_place(layer) or why_shared(shared, layer_name, "weight", "bias")
        if isinstance(layer, nn.Linear) and axes[norm_name] > 2:  # (N, C, features), and the norm's are those of C
            reason = ANOTHER_AXIS
        if reason is not None:
            skipped.add(norm_name, reason)
            continue
        scale_outputs_(layer, form.scale)
        bias = form.shift.to(layer.weight)  # type: ignore[arg-type]
        if layer.bias is None:
            layer.bias = nn.Parameter(bias, requires_grad=layer.weight.requires_grad)
        else:
            layer.bias.add_(bias)  # type: ignore[operator]
        replace_module(model, model.get_submodule(norm_name), form.rest)
        if form.trained:
            statistics[layer_name] = OutputStatistics(form.mean, form.std)
    skipped.log()
    if not same_output(output_on_noise(model, example), expected):
        raise ValueError(
            f"quantize.fold: {type(model).__name__} computes something else once its batch norms are merged; "
            "leave quantize.fold=none for it"
        )
    return statistics


@torch.no_grad()
def output_on_noise(model: nn.Module, example: Tensor) -> list[Tensor]:
    """All tensors of the output in eval mode for the same noise each time, of the shape of ``example`` (N, C, H, W)."""
    noise = torch.randn(example.shape, generator=torch.Generator().manual_seed(0)).to(example)
    with evaluating(model):
        output = model(noise)
    return [leaf.detach().clone() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def same_output(output: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether all tensors of the two differ by no more than rounding errors of another order of sums."""
    return len(output) == len(expected) and all(
        torch.allclose(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()) if other.numel() else 0.0)
        for one, other in zip(output, expected, strict=True)
    )


def fold_in_training_(model: nn.Module, example: Tensor) -> list[str]:
    """Make each quantized convolution of ``model`` that a batch norm follows round its weights as if they were merged.

    For a converted model, before calibration. The batch norm stays, see :class:`qtrain.nn.folded.FoldedWeight`. Returns
    the names of these convolutions. Where it is not possible, the reason is logged; this includes channels whose
    ``gamma`` is near 0 so far. Raises ``ValueError`` where there is no batch norm.
    """
    changed, skipped = [], Skipped("weights are not rounded as merged with batch norm")
    shared = shared_tensors(model)
    for layer_name, layer, norm_name, _ in foldable(model, "quantize.fold=training", skipped):
        norm = model.get_submodule(norm_name)
        if getattr(layer, "weight_quantizer", None) is None:
            continue
        reason = why_shared(shared, layer_name, "weight")
        if reason is not None:
            pass
        elif not isinstance(layer, QuantConv):
            reason = "only the weights of convolutions are"
        elif layer.weight_transform is not None:
            reason = "its weight is standardized before it is convolved"
        elif not isinstance(norm, _BatchNorm):
            reason = f"a {type(norm).__name__} does not train"
        elif (fixed := fixed_factors(norm)) is not None and bool((fixed > 0).all()):
            reason = "all its gammas are near 0, and a step in their units would clip all weights once they grow"
        else:
            layer.weight_transform = FoldedWeight(norm=norm, fixed=fixed)
            changed.append(layer_name)
            if fixed is None:
                continue
            reason = f"{int((fixed > 0).sum())} of its {len(fixed)} gammas are near 0; these channels are rounded apart"
        skipped.add(norm_name, reason)
    skipped.log()
    return changed


@torch.no_grad()
def scale_outputs_(layer: nn.Module, factor: Tensor) -> None:
    """Multiply weight and bias of a convolution or linear layer by ``factor`` (O,), one for each output channel."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    factor = factor.to(weight)
    if isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        scaled = _along(outputs_first(weight, layer.groups), factor)
        weight.copy_(outputs_first(scaled, layer.groups))
    else:
        weight.copy_(_along(weight, factor))
    if layer.bias is not None:
        layer.bias.mul_(factor)  # type: ignore[operator]


def _along(weight: Tensor, factor: Tensor) -> Tensor:
    return weight * factor.reshape(-1, *(1 for _ in weight.shape[1:]))


def foldable(model: nn.Module, asked: str, skipped: Skipped) -> Iterator[tuple[str, nn.Module, str, NormForm]]:
    """(layer's name, layer, norm's name, norm's form) of each batch norm that alone reads a layer's output."""
    if all(describe_norm(module) is None for module in model.modules()):
        raise ValueError(f"{asked}: {type(model).__name__} has no batch norm to merge; leave quantize.fold=none for it")
    graph = trace(model)
    norms = [(node, form) for node, module in calls(graph) if (form := describe_norm(module)) is not None]
    for node, form in norms:
        name, source = str(node.target), _source(graph, node)
        if isinstance(form, str):
            skipped.add(name, form)
        elif source is None:
            skipped.add(name, "it does not directly follow a convolution or linear layer")
        elif not (called_once(graph, node) and called_once(graph, source)):
            skipped.add(name, "it, or the layer before it, is used twice")
        elif has_hooks(graph.get_submodule(name)) or has_hooks(graph.get_submodule(str(source.target))):
            skipped.add(name, "it, or the layer before it, has hooks, which would see other values")
        elif len(form.scale) != getattr(graph.get_submodule(str(source.target)), "out_features", len(form.scale)):
            skipped.add(name, ANOTHER_AXIS)
        else:
            yield str(source.target), graph.get_submodule(str(source.target)), name, form


def _axes(model: nn.Module, example: Tensor) -> dict[str, int]:
    """How many axes the input of each norm of ``model`` has in a forward of ``example``; they normalize the second."""
    axes = {name: 0 for name, module in model.named_modules() if describe_norm(module) is not None}

    def see(name: str, x: Tensor) -> None:
        axes[name] = max(axes[name], x.ndim)

    with ExitStack() as hooks, evaluating(model):
        for name in axes:
            hooks.enter_context(see_input(model.get_submodule(name), partial(see, name)))
        model(example)
    return axes


def _source(graph: fx.GraphModule, norm: fx.Node) -> fx.Node | None:
    """The layer whose output only ``norm`` reads."""
    node = first_argument(norm.args, norm.kwargs)
    while isinstance(node, fx.Node) and len(node.users) == 1:
        module = called(graph, node)
        if module is None:
            return None
        if isinstance(describe_layer(module), LayerSpec) or isinstance(
            module, QuantConv | QuantConvTranspose | QuantLinear
        ):
            return node
        if not isinstance(module, nn.Identity | nn.Dropout | nn.Dropout2d) or has_hooks(module):
            return None
        node = first_argument(node.args, node.kwargs)
    return None


def _no_place(layer: nn.Module) -> str | None:
    """Why a norm cannot become part of ``layer``."""
    form = describe_layer(layer)
    if not isinstance(form, LayerSpec) or form.kind == "embedding":
        return f"a {type(layer).__name__} has no weight of its own to merge it into"
    return "its weight is standardized before it is convolved" if form.weight_transform is not None else None
