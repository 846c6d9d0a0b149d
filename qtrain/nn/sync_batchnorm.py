"""Batch norm over the whole batch, whatever number of ranks share it, so that N ranks train what one rank trains."""

from typing import final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qtrain.functional.ranks import gathered, world_size
from qtrain.nn.folded import FoldedWeight


def batch_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of ``x`` (N, C, ...) over all ranks: (C,) each.

    Ranks hold equally many values. With ``m_r``, ``v_r`` of each rank, ``mean = E[m_r]`` and
    ``var = E[v_r + (m_r - mean)^2]`` (Chan et al. 1979), which loses no digits where a mean is large. Gradients reach
    every rank's ``x``.
    """
    dims = [0, *range(2, x.dim())]
    mean, var = x.mean(dim=dims), x.var(dim=dims, unbiased=False)
    means, variances = gathered(torch.stack([mean, var])).unbind(1)
    mean = means.mean(dim=0)
    return mean, (variances + (means - mean).square()).mean(dim=0)


@final
class SyncBatchNorm(_BatchNorm):
    """Batch norm whose statistics in training are those of the batches of all ranks, on CPUs and on GPUs.

    torch's own layer needs a GPU and cannot be part of a compiled graph. State and names are those of ``norm``, whose
    place it takes; the drop and activation inside timm's fused layers stay. On one rank, and in eval mode, the same
    function as ``norm``.
    """

    def __init__(self, *, norm: _BatchNorm) -> None:
        super().__init__(
            norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats,
        )  # fmt: skip
        for name, value in (*norm.named_parameters(recurse=False), *norm.named_buffers(recurse=False)):
            setattr(self, name, value)
        for name, child in norm.named_children():
            self.add_module(name, child)
        self.train(norm.training)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"SyncBatchNorm: needs (N, C, ...), got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        together = self.training and world_size() > 1
        output = self._over_all_ranks(input) if together else super().forward(input)
        for child in self.children():
            output = child(output)
        return output

    def _over_all_ranks(self, x: Tensor) -> Tensor:
        # As in torch: statistics are float32 where the values have fewer digits.
        values = x if x.dtype in (torch.float32, torch.float64) else x.float()
        mean, var = batch_moments(values)
        if self.running_mean is not None and self.running_var is not None:
            self._follow(mean.detach(), var.detach(), x.numel() // x.shape[1] * world_size())
        shape = (1, -1, *(1 for _ in x.shape[2:]))
        scale = (var + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        output = (values - mean.reshape(shape)) * scale.reshape(shape)
        if self.bias is not None:
            output = output + self.bias.reshape(shape)
        return output.to(x.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Running statistics move by the momentum, or are the mean of all batches where that is ``None``."""
        assert self.running_mean is not None and self.running_var is not None
        rate: float | Tensor = 0.0 if self.momentum is None else self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                rate = 1 / self.num_batches_tracked.to(mean.dtype)
        unbiased = var * (count / max(1, count - 1))
        self.running_mean.add_((mean - self.running_mean) * rate)
        self.running_var.add_((unbiased - self.running_var) * rate)


def sync_batchnorm_(model: nn.Module) -> int:
    """Put a :class:`SyncBatchNorm` in the place of each batch norm of ``model`` that trains by its batch's statistics.

    Weights that are rounded as if merged with a norm follow the new one. Returns how many there are.
    """
    replaced: dict[_BatchNorm, SyncBatchNorm] = {}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, _BatchNorm) and not isinstance(child, SyncBatchNorm):
                if child not in replaced:
                    replaced[child] = SyncBatchNorm(norm=child)
                setattr(parent, name, replaced[child])
    for module in model.modules():
        if isinstance(module, FoldedWeight):
            module.follow(replaced)
    return len(replaced)
