"""Optimizers take torch's kernels for a whole step instead of its loop over parameters.

The kernels walk through a parameter, its gradient and its moments as they lie in memory. On a CPU they do not look at
strides, and a gradient of other strides than its parameter's, such as a contiguous one from other ranks beside a
parameter in channels-last order, is added to the wrong elements without a word. So all three are laid out alike.

A resume point does not say which way its steps were taken: whoever goes on with it decides for itself.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn, optim

from qtrain.training.optim import is_moment


def use_fused_(optimizer: optim.Optimizer) -> None:
    """Let ``optimizer``, which has taken no step yet, step by torch's kernels for a whole step, where it has such.

    An ``optimizer`` that was made with ``fused`` or ``foreach`` keeps that. The kernels know parameters of floats,
    without holes, on a CPU or a CUDA device; a group that holds a rank's share of a parameter goes without. ``fused``
    is set in the groups, and not given to the optimizer, since Lightning refuses to clip gradients in mixed precision
    for one that was made with it.
    """
    if optimizer.state:  # it has counters of steps already, which may be on another device than the kernels expect
        return
    chosen = frozenset(place for place, group in enumerate(optimizer.param_groups) if _would_gain(group))
    if not chosen:
        return
    for place in chosen:
        optimizer.param_groups[place]["fused"] = True
    optimizer.register_step_pre_hook(_prepare_step)
    # torch puts counters of steps where the groups of a state that is loaded ask for them.
    optimizer.register_load_state_dict_pre_hook(partial(_with_choice, chosen=chosen, fused=True))
    optimizer.register_state_dict_post_hook(partial(_with_choice, chosen=chosen, fused=None))


def _would_gain(group: dict[str, Any]) -> bool:
    undecided = "fused" in group and group["fused"] is None and group.get("foreach") is None
    # The kernels cannot be differentiated, and dampening has a first step of its own for each parameter.
    plain = not group.get("differentiable") and not group.get("dampening")
    return undecided and plain and all(map(_has_kernel, group["params"]))


def _has_kernel(parameter: Tensor) -> bool:
    plain = type(parameter) in (Tensor, nn.Parameter)
    known = plain and parameter.is_floating_point() and parameter.device.type in ("cpu", "cuda")
    return known and torch.empty_like(parameter).stride() == parameter.stride()  # as it is without holes


def _with_choice(
    optimizer: optim.Optimizer, state: dict[str, Any], *, chosen: frozenset[int], fused: bool | None
) -> dict[str, Any]:
    """``state`` of ``optimizer``, its groups ``chosen`` stepping ``fused``."""
    groups = [
        {**group, "fused": fused} if place in chosen else group for place, group in enumerate(state["param_groups"])
    ]
    return {**state, "param_groups": groups}


def _prepare_step(
    optimizer: optim.Optimizer, arguments: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Lay out what the step reads: before it, or once its closure, which Lightning gives, has made the gradients."""
    own, *given = arguments
    closure: Callable[[], Any] | None = given[0] if given else options.get("closure")
    if closure is None:
        _lay_out_(optimizer)
        return None

    def prepared() -> Any:
        loss = closure()
        _lay_out_(optimizer)
        return loss

    return (own,), {"closure": prepared}


@torch.no_grad()
def _lay_out_(optimizer: optim.Optimizer) -> None:
    """Give the gradient and the moments of each parameter its strides."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is None or not group["fused"]:
                continue
            parameter.grad = _laid_out(parameter.grad, parameter)
            moments = optimizer.state[parameter]
            # SGD's kernel takes none or all: also of one whose first gradient comes late.
            if group.get("momentum") and "momentum_buffer" not in moments:
                moments["momentum_buffer"] = torch.zeros_like(parameter)
            for name, value in moments.items():
                if is_moment(value, parameter):
                    moments[name] = _laid_out(value, parameter)


def _laid_out(value: Tensor, parameter: Tensor) -> Tensor:
    """``value`` with the strides of ``parameter``, whose shape it has."""
    if value.stride() == parameter.stride():
        return value
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
