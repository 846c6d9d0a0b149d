"""What the batch norm layers of torch and timm compute in eval mode, in terms that need no timm."""

from dataclasses import dataclass
from typing import Any

import torch
from timm.layers.norm_act import BatchNormAct2d, FrozenBatchNorm2d, FrozenBatchNormAct2d, SyncBatchNormAct
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

_PLAIN = (nn.BatchNorm1d.forward, nn.SyncBatchNorm.forward, FrozenBatchNorm2d.forward)
_WITH_ACTIVATION = (BatchNormAct2d.forward, SyncBatchNormAct.forward, FrozenBatchNormAct2d.forward)
_OF_AN_IMAGE = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _InstanceNorm)


@dataclass(frozen=True)
class NormForm:
    """A batch norm in eval mode: ``rest(scale x + shift)``, with ``scale = gamma / sqrt(var + eps)``.

    Over its training data ``scale x + shift`` has the moments ``mean = beta`` and ``std = |gamma| sqrt(var / (var +
    eps))``; all four are (C,) float32 and detached. ``trained`` is false where the running statistics are those of a
    new layer, so that ``mean`` and ``std`` describe no data. ``rest`` is the activation module inside timm's fused
    layers, otherwise the identity.
    """

    scale: Tensor
    shift: Tensor
    mean: Tensor
    std: Tensor
    trained: bool
    rest: nn.Module


def is_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a norm of torch or timm, over a batch or over each image by itself."""
    own = isinstance(module, _OF_AN_IMAGE) or type(module).__module__ == "timm.layers.norm"
    return own or describe_norm(module) is not None


def describe_norm(module: nn.Module) -> NormForm | str | None:
    """The form of a batch norm, the reason why it has none, or ``None`` for any other module."""
    if not isinstance(module, _BatchNorm | FrozenBatchNorm2d | FrozenBatchNormAct2d):
        return None
    layer: Any = module
    forward = type(module).forward
    if "forward" in vars(module) or forward not in (*_PLAIN, *_WITH_ACTIVATION):
        return f"a {type(module).__name__} has a forward of its own"
    if layer.running_mean is None or layer.running_var is None:
        return "it keeps no running statistics (track_running_stats=False)"
    mean, var = layer.running_mean.detach().float(), layer.running_var.detach().float()
    gamma = torch.ones_like(mean) if layer.weight is None else layer.weight.detach().float()
    beta = torch.zeros_like(mean) if layer.bias is None else layer.bias.detach().float()
    scale = gamma * (var + layer.eps).rsqrt()
    return NormForm(
        scale=scale,
        shift=beta - mean * scale,
        mean=beta.clone(),
        std=scale.abs() * var.sqrt(),
        trained=bool(mean.any()) or bool((var != 1).any()),
        rest=_rest(layer) if forward in _WITH_ACTIVATION else nn.Identity(),
    )


def _rest(layer: Any) -> nn.Module:
    parts = [part for part in (layer.drop, layer.act) if not isinstance(part, nn.Identity)]
    return nn.Sequential(*parts) if len(parts) > 1 else next(iter(parts), nn.Identity())
