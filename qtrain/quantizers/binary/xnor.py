"""XNOR-Net's inputs: a sign, and a map of input magnitudes that multiplies the layer's output."""

import math
from collections.abc import Mapping
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from qtrain.functional.ste import sign_ste
from qtrain.quantizers.base import float_parts
from qtrain.quantizers.binary.binary import Binary
from qtrain.spec import Observed, PerTensor, QuantSpec
from qtrain.storage.base import NumberPart


def magnitude_map(x: Tensor, layer: _ConvNd) -> Tensor:
    """``K = A * k`` of a convolution's input x (N, C, ...): the mean magnitude that each output position looks at.

    ``A`` is the mean of ``|x|`` over channels, ``k`` a box filter with the kernel size, stride, padding and dilation of
    ``layer`` and entries of ``1 / (kernel positions)``; the result (N, 1, ...) has the output's positions. Channels of
    a grouped convolution are averaged by group, and the result is (N, out_channels, ...).
    """
    groups = layer.groups
    area = x.abs().unflatten(1, (groups, layer.in_channels // groups)).mean(dim=2)
    padding = layer.padding
    if layer.padding_mode != "zeros":
        area = F.pad(area, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
        padding = (0,) * len(layer.kernel_size)
    box = area.new_full((groups, 1, *layer.kernel_size), 1 / math.prod(layer.kernel_size))
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(layer.kernel_size) - 1]
    result = convolve(area, box, None, layer.stride, padding, layer.dilation, groups)
    return result if groups == 1 else result.repeat_interleave(layer.out_channels // groups, dim=1)


@final
class XNOR(Binary):
    """``sign(x)`` of a layer's input with gradient ``1[|x| <= 1]`` (Rastegari et al. 2016, arXiv 1603.05279, §3.2).

    With ``scale_map`` the layer's output is multiplied, before the bias, by ``K``, the mean magnitude of the inputs
    that each output position looks at (eq. 11): :func:`magnitude_map`, of a linear layer the mean over its features. It
    comes from the input at hand, so nothing is stored. Inputs only; XNOR-Net's weights are ``bwn``. ``center``: see
    :class:`Binary`; ``K`` is then that of the centered input.
    """

    serves = frozenset({"input"})

    def __init__(self, *, spec: QuantSpec, scale_map: bool = True, center: bool = True) -> None:
        super().__init__(spec=spec, granularity=PerTensor(), center=center)
        self.scale_map = scale_map

    def fake_quantize(self, x: Tensor) -> Tensor:
        return sign_ste(self.centered(x)).to(x.dtype)

    def factor(self, x: Tensor) -> None:
        return None

    def output_factor(self, x: Tensor, layer: nn.Module) -> Tensor:
        """``K`` for the input ``x`` that ``layer`` multiplies; 1 without ``scale_map``."""
        if not (self.scale_map and self.enabled):
            return torch.ones((), dtype=x.dtype, device=x.device)
        centered = self.centered(x)
        if isinstance(layer, nn.Linear):
            return centered.abs().mean(dim=-1, keepdim=True).to(x.dtype)
        if isinstance(layer, _ConvNd) and not isinstance(layer, _ConvTransposeNd):
            # A layer that computes its own padding does so in a module before its convolution.
            pad = getattr(layer, "pad", None)
            return magnitude_map(centered if pad is None else pad(centered), layer).to(x.dtype)
        raise ValueError(
            f"XNOR: the scale map is defined for convolutions and linear layers, not for {type(layer).__name__}; "
            "give this layer another input quantizer, or scale_map=false"
        )

    def calibrate_(self, observed: Observed) -> None:
        self.center_(observed)
        self.initialized.fill_(True)

    def stored_state(self) -> Mapping[str, NumberPart]:
        return float_parts(threshold=self.threshold if self.center else None)
