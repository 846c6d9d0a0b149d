"""What each convolution and linear layer of timm computes, in terms that need no timm.

The converter swaps layers for quantized ones, which know a plain convolution, a module that pads before it, and a
module that transforms the weight (weight standardization). This file says for every module which of these it
needs, or why it has no quantized form. A quantized layer built so computes the same bits as the original.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import (
    BlurPool2d,
    CondConv2d,
    MultiQueryAttentionV2,
    ScaledStdConv2d,
    ScaledStdConv2dSame,
    StdConv2d,
    StdConv2dSame,
    pad_same,
)
from timm.layers import Linear as TimmLinear
from timm.layers.conv2d_same import Conv2dSame, Conv2dSameExport
from timm.layers.ml_decoder import MLDecoder
from timm.models.beit import Attention as BeitAttention
from timm.models.csatv2 import Dct1d
from timm.models.eva import EvaAttention
from timm.models.swiftformer import EfficientAdditiveAttention
from timm.models.swin_transformer_v2 import WindowAttention as SwinV2Attention
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from qtrain.utils.compat import has_state_hooks

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerSpec:
    """How to rebuild a layer: ``kind(pad(x), weight_transform(weight))``.

    ``kind`` is ``conv1d``, ``conv2d``, ``conv3d``, ``conv_transpose``, ``linear`` or ``embedding``; stride, dilation,
    groups and bias are the original's own attributes. With ``pad`` the convolution itself runs with padding 0, without
    it with the original's ``padding``. ``weight_transform`` maps the stored weight to the one that is convolved with,
    of the same shape; a gain that it owns is the original's parameter object. Both modules are new with each call of
    ``describe_layer``.
    """

    kind: str
    pad: nn.Module | None = None
    weight_transform: nn.Module | None = None


class SamePad(nn.Module):
    """Zeros around x (N, C, H, W), so that a convolution gives ceil(H / stride) rows; the odd one at the end."""

    def __init__(self, *, kernel_size: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.dilation = list(kernel_size), list(stride), list(dilation)

    def forward(self, x: Tensor) -> Tensor:
        padded: Tensor = pad_same(x, self.kernel_size, self.stride, self.dilation)
        return padded

    def amounts(self, sizes: Sequence[int]) -> tuple[list[int], list[int]]:
        """The zeros before and after each axis of an image of ``sizes`` (H, W)."""
        axes = zip(sizes, self.kernel_size, self.stride, self.dilation, strict=True)
        total = [max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0) for n, k, s, d in axes]
        return [zeros // 2 for zeros in total], [zeros - zeros // 2 for zeros in total]


class ModePad(nn.Module):
    """Padding by ``reflect``, ``replicate`` or ``circular``; ``amounts`` as F.pad takes them, last axis first."""

    def __init__(self, *, amounts: list[int], mode: str) -> None:
        super().__init__()
        self.amounts, self.mode = list(amounts), mode

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, self.amounts, mode=self.mode)


class StandardizeWeight(nn.Module):
    """w (O, I, kh, kw) -> gain * scale * (w - mean) / sqrt(var + eps), mean and variance over each output channel.

    Without ``gain`` the factor is 1. Batch norm over a batch of one computes it, as timm does: same kernel, same
    bits. Sources: Qiao et al. 2019 (weight standardization), Brock et al. 2021 (scaled, with gain).
    """

    def __init__(self, *, eps: float, gain: nn.Parameter | None = None, scale: float = 1.0) -> None:
        super().__init__()
        self.eps, self.scale = eps, scale
        self.gain = gain

    def forward(self, weight: Tensor) -> Tensor:
        flat = weight.reshape(1, weight.shape[0], -1)
        factor = None if self.gain is None else (self.gain * self.scale).view(-1)
        flat = F.batch_norm(flat, None, None, weight=factor, training=True, momentum=0.0, eps=self.eps)
        return flat.reshape_as(weight)


NO_FORM: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.Bilinear, "a bilinear layer has no quantized form"),
    (nn.RNNBase, "the matrices of a recurrent layer are used inside torch's fused kernel"),
    (nn.MultiheadAttention, "in_proj is used inside torch's fused attention"),
    (CondConv2d, "the kernel is mixed from experts for each image"),
    (MultiQueryAttentionV2, "its projections are bare matrices used in einsums"),
    (EfficientAdditiveAttention, "w_g is a bare vector of attention weights"),
    (MLDecoder, "duplicate_pooling is a bare stack of matrices"),
    (Dct1d, "a fixed cosine transform, not a trained weight"),
    (BlurPool2d, "a fixed blur filter, not a trained weight"),
)
"""Classes that multiply by a matrix without being a convolution or a linear layer, and why they are not quantized."""

FUSED_BIAS = (EvaAttention, BeitAttention, SwinV2Attention)
"""Attentions that keep q_bias and v_bias apart and call F.linear on ``qkv.weight`` themselves."""


def describe_layer(module: nn.Module) -> LayerSpec | str | None:
    """The form of one module, or the reason why it has none; ``None`` for a module without convolution or matrix."""
    for kind, form_of in _FORMS:
        if isinstance(module, kind):
            return _obstacle(module) or form_of(module)
    for kind, reason in NO_FORM:
        if isinstance(module, kind):
            return reason
    if isinstance(module, nn.EmbeddingBag | nn.LayerNorm | nn.RMSNorm):
        return None
    for name in ("weight", "weights"):
        weight = module._parameters.get(name)
        if weight is not None and weight.ndim >= 2:
            return f"a {type(module).__name__} uses its {name} in a way of its own"
    return None


def describe_model(model: nn.Module) -> dict[str, LayerSpec | str]:
    """Every convolution and matrix of a model by qualified name, with its form or the reason why it has none.

    Unlike ``describe_layer``, it also finds layers whose parent reads their weight instead of calling them. Run
    ``merge_fused_biases`` first, which makes the most common of these ordinary.
    """
    found: dict[str, LayerSpec | str] = {}
    bypassed: dict[str, str] = {}
    for name, module in model.named_modules():
        form = describe_layer(module)
        if form is not None:
            found[name] = form
        for child, reason in _bypassed_children(module).items():
            bypassed[f"{name}.{child}" if name else child] = reason
    return found | {name: reason for name, reason in bypassed.items() if name in found}


def merge_fused_biases(model: nn.Module) -> list[str]:
    """Give the qkv layers of BEiT, EVA and Swin v2 the bias that their attention adds for them; their names.

    These compute F.linear(x, qkv.weight, cat(q_bias, 0, v_bias)) and so bypass a quantized qkv. With the bias inside
    qkv and ``q_bias`` None they call ``qkv(x)``: the same bits, and a layer that can be swapped. The key bias, a
    constant zero before, can now be trained. Changes the model in place, and its checkpoint keys (``attn.q_bias``,
    ``attn.v_bias`` -> ``attn.qkv.bias``): load weights before.
    """
    merged = []
    attention: Any
    for name, attention in model.named_modules():
        if not _fuses_bias(attention):
            continue
        bias = torch.cat((attention.q_bias, attention.k_bias, attention.v_bias)).detach()
        attention.qkv.bias = nn.Parameter(bias, requires_grad=attention.q_bias.requires_grad)
        attention.q_bias = attention.v_bias = None
        merged.append(f"{name}.qkv" if name else "qkv")
    if merged:
        log.info("%s: q_bias and v_bias moved into %d qkv layers", type(model).__name__, len(merged))
    return merged


def _obstacle(module: nn.Module) -> str | None:
    """Why a convolution, linear or embedding layer cannot be taken by its class alone."""
    weight = module._parameters.get("weight")
    if isinstance(weight, nn.UninitializedParameter):
        return "its weight has no shape before the first forward"
    if weight is None:
        return "its weight is computed from others (parametrized, weight or spectral norm)"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    return "hooks change its state dict, which a quantized layer would not have" if has_state_hooks(module) else None


def _conv2d(module: nn.Conv2d) -> LayerSpec | str:
    """Decided by which class's forward runs, so that subclasses that only add a constructor are covered."""
    forward = type(module).forward
    if forward is nn.Conv2d.forward and type(module)._conv_forward is nn.Conv2d._conv_forward:
        if module.padding_mode == "zeros":
            return LayerSpec("conv2d")
        amounts = list(module._reversed_padding_repeated_twice)
        return LayerSpec("conv2d", pad=ModePad(amounts=amounts, mode=module.padding_mode))
    if forward in (Conv2dSame.forward, Conv2dSameExport.forward):
        return LayerSpec("conv2d", pad=_same_pad(module))
    if forward in (StdConv2d.forward, StdConv2dSame.forward, ScaledStdConv2d.forward, ScaledStdConv2dSame.forward):
        scaled = forward in (ScaledStdConv2d.forward, ScaledStdConv2dSame.forward)
        transform = (
            StandardizeWeight(eps=module.eps, gain=module.gain, scale=module.scale)  # type: ignore[arg-type]
            if scaled
            else StandardizeWeight(eps=module.eps)  # type: ignore[arg-type]
        )
        pad = _same_pad(module) if getattr(module, "same_pad", False) else None
        return LayerSpec("conv2d", pad=pad, weight_transform=transform)
    return f"a {type(module).__name__} has a forward of its own"


def _plain_conv(module: nn.Conv1d | nn.Conv3d) -> LayerSpec | str:
    kind = nn.Conv1d if isinstance(module, nn.Conv1d) else nn.Conv3d
    if type(module).forward is not kind.forward or type(module)._conv_forward is not kind._conv_forward:
        return f"a {type(module).__name__} has a forward of its own"
    name = f"conv{len(module.kernel_size)}d"
    if module.padding_mode == "zeros":
        return LayerSpec(name)
    return LayerSpec(name, pad=ModePad(amounts=list(module._reversed_padding_repeated_twice), mode=module.padding_mode))


def _transposed(module: _ConvTransposeNd) -> LayerSpec | str:
    if type(module).forward not in (nn.ConvTranspose1d.forward, nn.ConvTranspose2d.forward, nn.ConvTranspose3d.forward):
        return f"a {type(module).__name__} has a forward of its own"
    return LayerSpec("conv_transpose")


def _embedding(module: nn.Embedding) -> LayerSpec | str:
    if type(module).forward is not nn.Embedding.forward:
        return f"a {type(module).__name__} has a forward of its own"
    if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
        return "its max_norm, scale_grad_by_freq or sparse gradient acts on the table that is stored"
    return LayerSpec("embedding")


def _linear(module: nn.Linear) -> LayerSpec | str:
    if type(module).forward in (nn.Linear.forward, TimmLinear.forward):
        return LayerSpec("linear")
    return f"a {type(module).__name__} has a forward of its own"


def _same_pad(module: nn.Conv2d) -> SamePad:
    return SamePad(kernel_size=module.kernel_size, stride=module.stride, dilation=module.dilation)


def _fuses_bias(module: nn.Module) -> bool:
    """Whether the attention bypasses its qkv layer: Swin v2 always does, the others unless told otherwise."""
    return (
        isinstance(module, FUSED_BIAS)
        and module.q_bias is not None
        and isinstance(module.qkv, nn.Linear)
        and not getattr(module, "qkv_bias_separate", False)
    )


def _bypassed_children(module: nn.Module) -> dict[str, str]:
    """Children whose weight the module reads without calling them, with the reason."""
    if isinstance(module, nn.MultiheadAttention):
        return {"out_proj": "its weight is used inside torch's fused attention"}
    if isinstance(module, nn.TransformerEncoderLayer):
        return dict.fromkeys(("linear1", "linear2"), "its weight is used inside torch's fused encoder layer")
    if _fuses_bias(module):
        return {"qkv": "its attention reads the weight itself; merge_fused_biases(model) makes it an ordinary layer"}
    return {}


_FORMS: tuple[tuple[type[nn.Module], Callable[[Any], LayerSpec | str]], ...] = (
    (nn.Conv2d, _conv2d),
    (nn.Conv1d, _plain_conv),
    (nn.Conv3d, _plain_conv),
    (_ConvTransposeNd, _transposed),
    (nn.Linear, _linear),
    (nn.Embedding, _embedding),
)
