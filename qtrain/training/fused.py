"""Optimizers take torch's kernels for a whole step, which are several times faster than a loop over operations.

The kernels walk through a parameter, its gradient and its moments as they lie in memory. On a CPU they do not look at
strides, and a gradient of other strides than its parameter's, such as a contiguous one from other ranks beside a
parameter in channels-last order, is added to the wrong elements without a word. So what they see is laid out alike.

A resume point does not say which way its steps were taken: whoever goes on with it decides for itself.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn, optim


def use_fused_(optimizer: optim.Optimizer) -> None:
    """Let ``optimizer`` step by torch's kernels for a whole step, where it has such.

    A choice of its own (``fused`` or ``foreach``) stays. The kernels know parameters of floats, without holes, on a
    CPU or a CUDA device; ranks that share parameters go without. It is a group's option, and not the optimizer's,
    since Lightning refuses to clip gradients in mixed precision for an optimizer that was made with it.
    """
    chosen = frozenset(place for place, group in enumerate(optimizer.param_groups) if _would_gain(group))
    if not chosen:
        return
    for place in chosen:
        optimizer.param_groups[place]["fused"] = True
    optimizer.register_step_pre_hook(_lay_out_)
    # Before a state is loaded, too: it decides where the counters of steps are put.
    optimizer.register_load_state_dict_pre_hook(partial(_with_choice, chosen=chosen, fused=True))
    optimizer.register_state_dict_post_hook(partial(_with_choice, chosen=chosen, fused=None))


def _would_gain(group: dict[str, Any]) -> bool:
    undecided = "fused" in group and group["fused"] is None and group.get("foreach") is None
    return undecided and all(map(_has_kernel, group["params"]))


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


def _lay_out_(optimizer: optim.Optimizer, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Give the gradient and the moments of each parameter its strides."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad = _laid_out(parameter.grad, parameter)
            moments = optimizer.state.get(parameter, {})
            for name, value in moments.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    moments[name] = _laid_out(value, parameter)


def _laid_out(value: Tensor, parameter: Tensor) -> Tensor:
    """``value`` with the strides of ``parameter``, whose shape it has."""
    if value.stride() == parameter.stride():
        return value
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
