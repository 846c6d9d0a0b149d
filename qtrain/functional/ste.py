"""Straight-through estimators: the only custom gradients of the project live here.

A quantizer's forward is a staircase whose true derivative is zero almost everywhere. Each function below keeps the
exact forward and replaces the derivative by the one that its paper defines.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qtrain.functional.clamping import clamp_, clamped
from qtrain.functional.indicator import above, equal, sign

GradientRule = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(gradient, key of random draws, bits) -> the gradient to go on with."""


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class _Clamp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        ctx.save_for_backward(x, low, high)
        return clamped(x, low, high)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, low, high = ctx.saved_tensors
        return (grads[0] * _inside(x, clamped(x, low, high))).to(x.dtype), None, None


class _FakeQuantize(torch.autograd.Function):
    """Keeps ``x``, which what comes before mostly keeps too; all else is computed again in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: Tensor, high: Tensor, offset: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, scale, low, high, offset)
        values = clamp_(_steps(x, scale, offset), low, high).round_().mul_(scale)
        return (values if offset is None else values.add_(offset)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, low, high, offset = ctx.saved_tensors
        (given,) = grads
        for_x = for_scale = for_offset = None
        steps = _steps(x, scale, offset)
        clipped = clamped(steps, low, high)
        inside = _inside(steps, clipped)
        if ctx.needs_input_grad[0]:
            for_x = (given * inside).to(x.dtype)
        if ctx.needs_input_grad[1]:
            for_scale = clipped.round_().sub_(steps.mul_(inside)).mul_(given).sum_to_size(scale.shape)
        if offset is not None and ctx.needs_input_grad[4]:
            for_offset = inside.neg_().add_(1).mul_(given).sum_to_size(offset.shape)
        return for_x, for_scale, None, None, for_offset


def _inside(x: Tensor, bounded: Tensor) -> Tensor:
    """1 where ``bounded``, which is ``x`` clamped, still is ``x``, else 0; shape and dtype of ``x``.

    Numbers, since torch is slow to multiply by booleans.
    """
    if torch.compiler.is_compiling():
        return equal(x, bounded)
    return torch.eq(bounded, x, out=torch.empty_like(x))


def _steps(x: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """``(x - b) / s`` in float32, a tensor of its own."""
    return (x.float() if offset is None else x.float() - offset) / scale


class _Clip(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, level: Tensor, floor: Tensor) -> Tensor:
        ctx.save_for_backward(x, level, floor)
        return clamped(x.float(), floor * level, level)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, level, floor = ctx.saved_tensors
        over, under = 1 - above(level, x.float()), above(floor * level, x.float())
        for_x = (grads[0] * (1 - over - under)).to(x.dtype) if ctx.needs_input_grad[0] else None
        for_level = (grads[0] * (over + floor * under)).sum() if ctx.needs_input_grad[1] else None
        return for_x, for_level, None


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        return grads[0] * factor, None


def round_ste(x: Tensor) -> Tensor:
    """Round to the nearest integer, ties to even; the gradient passes unchanged (Bengio 2013, arXiv 1308.3432)."""
    result: Tensor = _Round.apply(x)
    return result


def clamp_to(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """``x`` clamped to bounds that get no gradient; its own passes where ``low <= x <= high``, both ends included.

    torch's own clamp halves the gradient where ``x`` equals a bound that is a tensor.
    """
    result: Tensor = _Clamp.apply(x, low, high)
    return result


def expressible(x: Tensor, low: Tensor) -> Tensor:
    """``x``, with 0 for negative values where the lowest code ``low``, 0-dim, is not below 0; its gradient likewise."""
    lowest = torch.where(low < 0, -torch.inf, 0.0)
    return clamp_to(x, lowest, torch.full_like(lowest, torch.inf))


def fake_quantize_ste(x: Tensor, scale: Tensor, low: Tensor, high: Tensor, offset: Tensor | None = None) -> Tensor:
    """``round(clamp((x - b) / s, low, high)) s + b`` with the gradients of LSQ and LSQ+; shape and dtype of ``x``.

    ``scale`` s and ``offset`` b, 0 without one, broadcast against ``x``, ``low`` and ``high``, which get no gradient,
    against both; all are float32, in which the result is computed. With ``t = (x - b) / s``, inside where ``low <= t <=
    high``, both ends included: for ``x`` 1 inside and 0 outside; for ``scale`` ``round(t) - t`` inside and the clipped
    code outside (arXiv 1902.08153, eq. 3); for ``offset`` 0 inside and 1 outside (arXiv 2004.09576, eq. 5).
    """
    result: Tensor = _FakeQuantize.apply(x, scale, low, high, offset)
    return result


def clip_ste(x: Tensor, level: Tensor, floor: Tensor) -> Tensor:
    """``x`` clipped to ``[floor level, level]``, in float32; ``level`` > 0 and ``floor``, 0 or -1, are 0-dim.

    With ``floor = 0`` that is ``(|x| - |x - a| + a) / 2`` (PACT, arXiv 1805.06085, eq. 1), whose derivative in the
    level ``a`` is 1 where ``x >= a`` and 0 elsewhere (eq. 3): unlike LSQ's, it does not see how values are rounded.
    """
    result: Tensor = _Clip.apply(x, level, floor)
    return result


def scale_gradient(x: Tensor, factor: Tensor) -> Tensor:
    """The identity in the forward, bit for bit; multiplies the gradient by ``factor`` (LSQ, arXiv 1902.08153, §2.2)."""
    result: Tensor = _ScaleGradient.apply(x, factor)
    return result


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, surrogate: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, grads[0]


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return sign(x).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return (grads[0] * _inside(x, x.clamp(-1, 1))).to(x.dtype)


class _WithPenalty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, penalty: Tensor) -> Tensor:
        ctx.save_for_backward(penalty)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (penalty,) = ctx.saved_tensors
        return grads[0], torch.ones_like(penalty)


def straight_through(value: Tensor, surrogate: Tensor) -> Tensor:
    """``value``, bit for bit, with the gradient of ``surrogate``, which has the same shape.

    With ``surrogate = x`` it is the plain straight-through estimator of whatever rounding made ``value`` from ``x``.
    """
    result: Tensor = _StraightThrough.apply(value.detach(), surrogate)
    return result


def sign_ste(x: Tensor) -> Tensor:
    """-1 or 1, and 1 at zero; the gradient passes where ``|x| <= 1`` (BNN, arXiv 1602.02830, eq. 4)."""
    result: Tensor = _Sign.apply(x)
    return result


def with_penalty(x: Tensor, penalty: Tensor) -> Tensor:
    """``x``, bit for bit; in the backward ``penalty`` (0-dim) gets the gradient that it would have as part of the loss.

    So a method whose paper adds a regularizer to the loss can do that from inside its own forward. The reported loss
    does not contain it; every backward through ``x`` adds it once. Where several backwards make one step, a quantizer
    multiplies it by its ``penalty_share`` (:class:`qtrain.quantizers.hooks.Penalizing`).
    """
    result: Tensor = _WithPenalty.apply(x, penalty)
    return result


class _WithGradientRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rule: GradientRule, key: Tensor, bits: Tensor) -> Tensor:
        ctx.rule = rule
        ctx.save_for_backward(key, bits)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        key, bits = ctx.saved_tensors
        return ctx.rule(grads[0], key, bits), None, None, None


def with_gradient_rule(x: Tensor, rule: GradientRule, key: Tensor, bits: Tensor) -> Tensor:
    """``x``, bit for bit; in the backward its gradient ``g`` is replaced by ``rule(g, key, bits)``, of the same shape.

    Gradients are quantized in this way (DoReFa, arXiv 1606.06160, §2.5). Random draws are a function of ``key``.
    ``bits`` and ``key`` are tensors, so that a change of them does not recompile the graph.
    """
    result: Tensor = _WithGradientRule.apply(x, rule, key, bits)
    return result


class _AlsoTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, x: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], grads[0]


def gradient_also_to(value: Tensor, x: Tensor) -> Tensor:
    """``value``, bit for bit, with its own gradient; ``x``, of the same shape and type, gets the same gradient.

    For values of a learned table, looked up with an index that was rounded from ``x``.
    """
    result: Tensor = _AlsoTo.apply(value, x)
    return result
