"""Filling the quantizers' state from the weights and from a few batches of images."""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from qtrain.convert.layers import quant_layers, quantizers_of, switched_off
from qtrain.convert.plan import LayerPlan, observer_for
from qtrain.nn import Operand
from qtrain.observers.base import Observer
from qtrain.quantizers.base import Quantizer
from qtrain.utils.calls import see_input
from qtrain.utils.eval_mode import evaluating


@torch.no_grad()
def calibrate(model: nn.Module, images: Iterable[Tensor], plans: Mapping[str, LayerPlan]) -> None:
    """Initialize every quantizer of ``model`` in place, with the observers of its layer's plan.

    Weights are observed as they are, inputs by :func:`observe_inputs`. Raises ``ValueError`` where a layer with an
    input quantizer saw no image.
    """
    calibrate_weights(model, observe_weights(model, plans))
    calibrate_inputs(model, observe_inputs(model, images, plans))


@torch.no_grad()
def observe_inputs(model: nn.Module, images: Iterable[Tensor], plans: Mapping[str, LayerPlan]) -> dict[str, Observer]:
    """The observer of each layer with an input quantizer, by the layer's name, once it has seen the layer's inputs.

    ``images``, an iterable of (N, C, H, W), are run in full precision and in eval mode. So the rounding of one layer
    does not change what the next one observes, and the observations are the same for any bits. The modes of all modules
    are restored.
    """
    layers = quant_layers(model)
    observers: dict[str, Observer] = {}
    shared: dict[Quantizer, Observer] = {}  # layers that share a quantizer are observed as one
    with ExitStack() as hooks, switched_off(quantizers_of(model).values()), evaluating(model):
        for name, layer in layers.items():
            if layer.input_quantizer is not None:
                made = observer_for(layer.input_quantizer, plans[name].input_observer)
                observers[name] = shared.setdefault(layer.input_quantizer, made)
                hooks.enter_context(see_input(layer, observers[name].update))
        for batch in images:
            model(batch)
    return observers


@torch.no_grad()
def calibrate_inputs(model: nn.Module, observers: Mapping[str, Observer]) -> None:
    """Initialize the input quantizers of ``model`` in place from what :func:`observe_inputs` saw."""
    layers = quant_layers(model)
    for name, observer in observers.items():
        quantizer = layers[name].input_quantizer
        assert quantizer is not None
        if observer.shape is None:
            raise ValueError(f"calibrate: layer {name!r} saw no image; give at least one calibration batch")
        quantizer.calibrate_(observer.observed(int(quantizer.bits)))


@torch.no_grad()
def calibrate_weights(model: nn.Module, observers: Mapping[str, Observer]) -> None:
    """Initialize the weight quantizers of ``model`` in place from what :func:`observe_weights` saw."""
    for name, layer in quant_layers(model).items():
        if layer.weight_quantizer is not None and not isinstance(layer, Operand):
            observed = observers[name].observed(int(layer.weight_quantizer.bits))
            layer.weight_quantizer.calibrate_(observed._replace(tensor=layer.effective_weight()))


@torch.no_grad()
def observe_weights(model: nn.Module, plans: Mapping[str, LayerPlan]) -> dict[str, Observer]:
    """The observer of each layer with a weight quantizer, by the layer's name, once it has seen the weight."""
    observers: dict[str, Observer] = {}
    for name, layer in quant_layers(model).items():
        if layer.weight_quantizer is not None and not isinstance(layer, Operand):
            observers[name] = observer_for(layer.weight_quantizer, plans[name].weight_observer)
            observers[name].update(layer.effective_weight())
    return observers
