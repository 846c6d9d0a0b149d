"""Uniform (affine) quantization as pure functions: ``q = clamp(round(x / s) + z)``, ``x^ = (q - z) s``.

Source: Jacob et al. 2018 (arXiv 1712.05877), Krishnamoorthi 2018 (arXiv 1806.08342). Fake quantization has to match the
deployed integers, so ``x / s`` is computed as a division, as in ONNX ``QuantizeLinear``. Torch's fake-quantize
operators multiply by the reciprocal instead; the result differs in the last place, and therefore at ties.
"""

import torch
from torch import Tensor

from qtrain.functional.clamping import clamp_
from qtrain.functional.ste import fake_quantize_ste


def code_range(bits: int, *, signed: bool, narrow: bool = False) -> tuple[int, int]:
    """Lowest and highest code of ``bits`` bits.

    Signed: ``[-2^(b-1), 2^(b-1)-1]``, without the lowest where ``narrow``; unsigned: ``[0, 2^b - 1]``.

    >>> code_range(4, signed=True), code_range(4, signed=True, narrow=True), code_range(4, signed=False)
    ((-8, 7), (-7, 7), (0, 15))
    """
    if not signed:
        return 0, 2**bits - 1
    high = 2 ** (bits - 1) - 1
    return (-high if narrow else -high - 1), high


def fake_quantize(x: Tensor, scale: Tensor, low: Tensor, high: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """Quantize and dequantize ``x``; same shape and dtype, computed in float32.

    ``scale`` and ``zero_point`` broadcast against ``x``; ``low`` and ``high`` are the code range, 0-dim, so that a
    change of bits does not recompile the graph. Gradients, with ``t = x / s + z``: 1 for ``x`` where ``low <= t <=
    high``, else 0; for ``scale`` ``round(t) - t`` inside and the clipped code outside, which is LSQ's equation 3 (arXiv
    1902.08153).
    """
    if zero_point is not None:
        low, high = low - zero_point, high - zero_point
    return fake_quantize_ste(x, scale, low, high)


def quantize(x: Tensor, scale: Tensor, low: Tensor, high: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """Integer codes of ``x``, int32, shape of ``x``: exactly the codes that :func:`fake_quantize` passes through.

    Raises ``ValueError`` where ``x`` is not finite.
    """
    require_finite(x)
    steps = x.float() / scale
    if zero_point is None:
        return clamp_(steps, low, high).round().to(torch.int32)
    return (clamp_(steps, low - zero_point, high - zero_point).round() + zero_point).to(torch.int32)


def require_finite(x: Tensor) -> None:
    """Raise ``ValueError`` if ``x`` holds NaN or infinity, which no code represents."""
    if not torch.isfinite(x).all():
        raise ValueError("quantize: the tensor holds NaN or infinity, which no code represents; look for its source")


def symmetric_scale(low: Tensor, high: Tensor, code_low: Tensor, code_high: Tensor) -> Tensor:
    """Step that makes ``max(|low|, |high|)`` the highest code; 1 where the range is empty (all values zero).

    For unsigned codes only ``high`` counts. Shapes: those of ``low``.
    """
    reach = torch.where(code_low < 0, torch.maximum(low.abs(), high.abs()), high.abs())
    return _or_one(reach / code_high.clamp(min=1))


def asymmetric_scale(low: Tensor, high: Tensor, code_low: Tensor, code_high: Tensor) -> tuple[Tensor, Tensor]:
    """Step and zero point that spread ``[low, high]``, widened to contain 0, over all codes.

    ``s = (high - low) / (code_high - code_low)``, ``z = round(code_low - low / s)`` (Jacob 2018, eq. 1 and §3), both
    with the shape of ``low``; ``z`` is a whole number in float32.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = _or_one((high - low) / (code_high - code_low))
    return scale, (code_low - low / scale).round().clamp(code_low, code_high)


def _or_one(scale: Tensor) -> Tensor:
    return torch.where(scale > torch.finfo(torch.float32).tiny, scale, torch.ones_like(scale))
