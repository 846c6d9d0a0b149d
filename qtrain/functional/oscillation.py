"""Weights that oscillate between two codes during training: detection, frequency and dampening.

Source: Nagel, Fournarakis, Bondarenko, Blankevoort 2022, "Overcoming Oscillations in Quantization-Aware Training",
arXiv 2203.11086.
"""

from torch import Tensor

from qtrain.functional.ste import clamp_to


def turned_back(code: Tensor, before: Tensor, direction: Tensor) -> Tensor:
    """Whether a code changed against the ``direction`` of its last change: bool (§4.1).

    ``code`` and ``before`` are codes of this step and the last; ``direction`` is -1 or 1, or 0 before any change.
    """
    return (code - before).sign() * direction < 0


def ema(average: Tensor, value: Tensor, momentum: float) -> Tensor:
    """``m value + (1 - m) average`` (eq. of §4.1), float32."""
    return momentum * value.float() + (1 - momentum) * average


def distance_to_codes(weight: Tensor, step: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The dampening term ``|s w_int - clip(w, s n, s p)|^2``, a sum over all elements, 0-dim (§4.2).

    ``step`` s broadcasts against ``weight``; ``low`` n and ``high`` p are codes, 0-dim. The gradient is that of
    ``clip(w, ...)``: it draws ``w`` to the middle of its bin. ``s`` and clipped elements get no gradient.
    """
    step = step.detach()
    clipped = clamp_to(weight.float(), step * low, step * high)
    middle = (clipped.detach() / step).round() * step
    return (middle - clipped).square().sum()
