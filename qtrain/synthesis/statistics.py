"""How far the inputs of a model's batch norm layers are from their inputs in training.

A batch norm layer keeps the mean and the variance of its inputs over the training data. A model holds no other record
of its training images. Images are made by minimizing this distance (ZeroQ, Cai et al. 2020, arXiv 2001.00281, eq. 2;
DeepInversion, Yin et al. 2020, arXiv 1912.08795, eq. 4), and generators are trained with it.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qtrain.utils.calls import see_input

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
"""Layers with running statistics; timm's batch norm with an activation is a subclass."""

NAMES_SHOWN = 4


class Moments(NamedTuple):
    """Mean and standard deviation of each channel, both (C,) float32."""

    mean: Tensor
    std: Tensor


def moments(x: Tensor, eps: float) -> Moments:
    """The moments of ``x`` (N, C, ...) over all axes but axis 1.

    The std is ``sqrt(var + eps)`` with the biased variance: batch norm divides by it, and its gradient stays finite
    where a channel is constant.
    """
    axes = [axis for axis in range(x.dim()) if axis != 1]
    x = x.float()
    mean = x.mean(dim=axes)
    # With two plain sums, forward and backward take half the time of torch.var_mean on a CPU.
    var = (x.square().mean(dim=axes) - mean.square()).clamp(min=0.0)
    return Moments(mean, (var + eps).sqrt())


def squared_distance(batch: Moments, running: Moments) -> Tensor:
    """``||mean - mean'||^2 + ||std - std'||^2``, summed over channels; 0-dim."""
    return (batch.mean - running.mean).square().sum() + (batch.std - running.std).square().sum()


@final
class StatisticsMatch:
    """After ``model(x)``, ``loss()`` is the distance of this batch's statistics from the running ones.

        with StatisticsMatch(model) as match:
            logits = model(images)
            match.loss().backward()

    It is the sum over batch norm layers ``l`` of ``||mean_l(x) - mean_l||^2 + ||std_l(x) - std_l||^2``, with the mean
    and std of the layer's input over samples and positions. It has gradients to the images in any mode of the layers. A
    layer that is called several times counts each time. ``close()``, or leaving the block, removes the hooks.

    Raises ``ValueError`` for a model without batch norm, and for statistics that were never trained.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = statistics_layers(model)
        self._running = {
            name: Moments(_mean(layer).detach().float().clone(), (_var(layer).detach().float() + layer.eps).sqrt())
            for name, layer in layers.items()
        }
        self._seen: list[tuple[str, Moments]] = []
        self._handles: list[RemovableHandle] = [model.register_forward_pre_hook(self._begin)]
        self._handles += [self._watch(name, layer) for name, layer in layers.items()]

    def loss(self) -> Tensor:
        """The distance at the last forward of the whole model, 0-dim float32."""
        if not self._seen:
            raise ValueError("StatisticsMatch: no batch norm layer was called; run the model on images before loss()")
        return torch.stack([squared_distance(batch, self._running[name]) for name, batch in self._seen]).sum()

    def close(self) -> None:
        """Remove the hooks from the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._seen.clear()

    def __enter__(self) -> "StatisticsMatch":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _begin(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        self._seen.clear()

    def _watch(self, name: str, layer: BatchNorm) -> RemovableHandle:
        return see_input(layer, lambda x: self._seen.append((name, moments(x, layer.eps))))


def statistics_layers(model: nn.Module) -> Mapping[str, BatchNorm]:
    """The batch norm layers of ``model`` by name; ``ValueError``, with the remedy, if their statistics are unusable."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, BatchNorm)}
    kind = type(model).__name__
    if not layers:
        raise ValueError(
            f"StatisticsMatch: {kind} has no batch norm layer, whose running statistics the images are made from; "
            "take a model that has, or synthesis=patch_similarity for a transformer"
        )
    without = [name for name, layer in layers.items() if layer.running_mean is None or layer.running_var is None]
    if without:
        raise ValueError(
            f"StatisticsMatch: {_some(without)} of {kind} keeps no running statistics (track_running_stats=False); "
            "train it with them"
        )
    broken = [name for name, layer in layers.items() if not (_mean(layer).isfinite() & _var(layer).isfinite()).all()]
    if broken:
        raise ValueError(f"StatisticsMatch: running statistics of {_some(broken)} of {kind} are not finite; train anew")
    untrained = [name for name, layer in layers.items() if not _mean(layer).any() and (_var(layer) == 1).all()]
    if untrained:
        raise ValueError(
            f"StatisticsMatch: running statistics of {_some(untrained)} of {kind} are 0 and 1, as before any training; "
            "give trained weights (model.weights), and do not freeze batch norm from the start"
        )
    return layers


def _mean(layer: BatchNorm) -> Tensor:
    assert layer.running_mean is not None
    return layer.running_mean


def _var(layer: BatchNorm) -> Tensor:
    assert layer.running_var is not None
    return layer.running_var


def _some(names: list[str]) -> str:
    return ", ".join(names[:NAMES_SHOWN]) + (
        f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    )
