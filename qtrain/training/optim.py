"""Parameter groups (which parameters decay or have their own rate), and the state of optimizers."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytorch_lightning as pl
from torch import Tensor, nn, optim

from qtrain.models.sharding import shared_as, whole
from qtrain.quantizers.base import Quantizer

MakeOptimizer = Callable[[list[dict[str, Any]]], optim.Optimizer]


def parameter_groups(
    modules: Iterable[nn.Module], *, scale_lr: float | None = None, norm_decay: bool = False
) -> list[dict[str, Any]]:
    """The groups ``weights``, ``no_decay`` and ``scales`` of all parameters that learn; empty groups are left out.

    The parameters of quantizers are in ``scales``. They have the learning rate ``scale_lr`` if it is given, and no
    decay, which would make the range too small. Biases and the vectors of normalization layers are in ``no_decay``
    unless ``norm_decay``, and weights that stay as they are while their quantizer learns. All others decay as the
    optimizer says.
    """
    scales: dict[nn.Parameter, None] = {}
    weights: dict[nn.Parameter, None] = {}
    vectors: dict[nn.Parameter, None] = {}
    still: dict[nn.Parameter, None] = {}
    for module in modules:
        for child in module.modules():
            held = getattr(child, "weight_quantizer", None)
            if isinstance(held, Quantizer) and not held.moves_weight and isinstance(child.weight, nn.Parameter):
                still[child.weight] = None
            if isinstance(child, Quantizer):
                scales.update(dict.fromkeys(p for p in child.parameters() if p.requires_grad))
        for parameter in module.parameters():
            if parameter.requires_grad and parameter not in scales:
                decays = parameter not in still and (parameter.ndim > 1 or norm_decay)
                (weights if decays else vectors)[parameter] = None
    groups: list[dict[str, Any]] = [
        {"name": "weights", "params": list(weights)},
        {"name": "no_decay", "params": list(vectors), "weight_decay": 0.0},
        {"name": "scales", "params": list(scales), "weight_decay": 0.0},
    ]
    if scale_lr is not None:
        groups[2]["lr"] = scale_lr
    return [group for group in groups if group["params"]]


def still_accumulating(trainer: pl.Trainer) -> bool:
    """Whether no optimizer step follows the current batch, since gradients of further batches are to be added.

    Lightning steps after every ``accumulate_grad_batches``-th batch of an epoch and after its last one.
    """
    batches = trainer.fit_loop.batch_idx + 1
    last = trainer.is_last_batch or batches == trainer.num_training_batches
    return not last and batches % trainer.accumulate_grad_batches != 0


def whole_optimizer_state(optimizer: optim.Optimizer) -> dict[str, Any]:
    """The state dict of ``optimizer`` with whole tensors, if ranks have shares; all ranks must call this."""
    state = optimizer.state_dict()
    moments = {
        place: {name: whole(value) if isinstance(value, Tensor) else value for name, value in own.items()}
        for place, own in state["state"].items()
    }
    return {**state, "state": moments}


def load_optimizer_state_(optimizer: optim.Optimizer, state: Mapping[str, Any]) -> None:
    """``optimizer.load_state_dict(state)``; each rank takes its share of the moments of a shared parameter."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    places = [place for group in state["param_groups"] for place in group["params"]]
    moments = dict(state["state"])
    for place, parameter in zip(places, parameters, strict=True):
        moments[place] = {
            name: shared_as(value, parameter) if is_moment(value, parameter) else value
            for name, value in moments.get(place, {}).items()
        }
    optimizer.load_state_dict({**state, "state": {place: own for place, own in moments.items() if own}})


def is_moment(value: Any, parameter: Tensor) -> bool:
    """Whether ``value``, a part of an optimizer's state of ``parameter``, has a number for each of its elements."""
    return isinstance(value, Tensor) and value.shape == parameter.shape
