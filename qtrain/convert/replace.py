"""Putting a quantized layer in the place of another, and finding out where that has no effect.

A model may reach a layer otherwise than by its name: through a Python list, an attribute that holds the layer itself,
a bound method. Such a reference goes on leading to the layer that was replaced. So the layers are all replaced for one
forward, which shows what is called and what is not.
"""

from collections.abc import Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from qtrain.models.layer_kinds import LayerSpec
from qtrain.nn import Operand, QuantConv, QuantConvTranspose, QuantEmbedding, QuantLayer, QuantLinear
from qtrain.utils.compat import share_hooks_
from qtrain.utils.eval_mode import evaluating

BYPASSED = (
    "its owner calls it through a reference of its own (a Python list, an attribute that holds the layer), so that a "
    "quantized layer in its place is never called; hold it in a torch.nn.ModuleList and call it from there"
)
PARTLY_BYPASSED = (
    "some of its calls go through a reference of its owner (a Python list, an attribute that holds the layer), which a "
    "quantized layer in its place does not get; call it by one name, or from a torch.nn.ModuleList"
)
AVOIDED = "the forward goes another way once a quantized layer is in its place: it asks for the layer's class"


def quantized_form(source: nn.Module, form: LayerSpec) -> QuantLayer:
    """The quantized layer that takes the place of ``source``, without quantizers so far.

    Parameters and hooks are shared.
    """
    match form.kind:
        case "conv1d" | "conv2d" | "conv3d":
            assert isinstance(source, _ConvNd)
            made: QuantLayer = QuantConv(source=source, pad=form.pad, weight_transform=form.weight_transform)
        case "conv_transpose":
            assert isinstance(source, _ConvTransposeNd)
            made = QuantConvTranspose(source=source)
        case "embedding":
            assert isinstance(source, nn.Embedding)
            made = QuantEmbedding(source=source)
        case "operand":
            assert isinstance(source, Operand)
            return source
        case _:
            assert isinstance(source, nn.Linear)
            made = QuantLinear(source=source)
    share_hooks_(source, made)
    if form.pad is None and form.weight_transform is None:  # which have what a class of timm added
        _carry_over_(source, made)
    return made


def _carry_over_(source: nn.Module, made: nn.Module) -> None:
    """Give ``made`` what ``source`` has besides: parameters, buffers, children and attributes of a class of its own."""
    kept = source.state_dict()
    for name, parameter in source._parameters.items():
        if not hasattr(made, name):
            made.register_parameter(name, parameter)
    for name, buffer in source._buffers.items():
        if not hasattr(made, name):
            made.register_buffer(name, buffer, persistent=name in kept)
    for name, child in source.named_children():
        if not hasattr(made, name):
            made.add_module(name, child)
    vars(made).update({name: value for name, value in vars(source).items() if not hasattr(made, name)})


def replace_module(model: nn.Module, source: nn.Module, layer: nn.Module) -> None:
    """Replace ``source`` by ``layer`` everywhere in ``model``: a module that is shared has several names."""
    replace_modules(model, {source: layer})


def replace_modules(model: nn.Module, layers: Mapping[nn.Module, nn.Module]) -> None:
    """Replace every key of ``layers`` by its value everywhere in ``model``."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in layers:
                setattr(parent, name, layers[child])


@torch.no_grad()
def unreached(model: nn.Module, example: Tensor, forms: Mapping[str, LayerSpec]) -> dict[str, str]:
    """The layers among ``forms`` that cannot be replaced with an effect: qualified name -> reason.

    All of them are replaced by their quantized forms, without quantizers, for one forward of ``example`` (N, C, H, W)
    in eval mode. A form must be called in it, and the layer that it replaced must not. The model is left as it was.
    """
    called: set[nn.Module] = set()
    with ExitStack() as stack, evaluating(model):
        sources = {name: model.get_submodule(name) for name in forms}
        made = {name: quantized_form(source, forms[name]) for name, source in sources.items()}
        for source in sources.values():
            # The form has the same hooks, so this one tells which of the two is called.
            stack.enter_context(source.register_forward_pre_hook(lambda module, _: called.add(module)))
        stack.callback(replace_modules, model, {made[name]: source for name, source in sources.items()})
        replace_modules(model, {source: made[name] for name, source in sources.items()})
        model(example)
    reasons = {}
    for name, source in sources.items():
        if made[name] not in called:
            reasons[name] = BYPASSED if source in called else AVOIDED
        elif source in called and source is not made[name]:
            reasons[name] = PARTLY_BYPASSED
    return reasons
