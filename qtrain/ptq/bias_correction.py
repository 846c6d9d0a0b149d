"""Bias correction: rounding shifts the mean of each output channel of a layer, and the bias undoes that.

``E[y~] - E[y]`` is subtracted from the bias of each output channel (Nagel et al. 2019, arXiv 1906.04721, §4.2). It is
computed from the statistics of batch norm without images, or from images. After learned rounding there is nothing to
correct, since the weights then lie on their quantizer's grid.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from qtrain.convert.fold import OutputStatistics
from qtrain.convert.graph import Skipped
from qtrain.convert.layers import quant_layers, quantizers_of, switched_off
from qtrain.nn import Operand, QuantConv, QuantConvTranspose, QuantEmbedding, QuantLinear
from qtrain.nn.base import quantized_weight
from qtrain.ptq.bn_propagation import expected, follow, product_mean
from qtrain.utils.eval_mode import evaluating
from qtrain.utils.sharing import shared_tensors, why_shared

Correctable = QuantConv | QuantConvTranspose | QuantLinear
Look = Callable[[str, Correctable, Tensor], Tensor | None]


class BiasCorrection(ABC):
    """Base of corrections; subclasses are final. ``needs_images`` is false for those that use only statistics."""

    needs_images: ClassVar[bool] = True

    @abstractmethod
    def __call__(
        self, student: nn.Module, images: Sequence[Tensor], statistics: Mapping[str, OutputStatistics]
    ) -> None:
        """Correct the biases of ``student``, converted and calibrated, in place.

        ``images`` are batches (N, C, H, W); ``statistics`` are those of :func:`qtrain.convert.fold.fold_batchnorm_`.
        A layer that has no bias for itself alone is left unchanged and logged. Raises ``ValueError`` where there is
        neither an image nor a statistic.
        """


@final
class FromStatistics(BiasCorrection):
    """``E[y~] - E[y] = (Q(W) - W) E[x]``, with the input's mean from batch norm's statistics alone (§4.2.1).

    ``E[x]`` is that of normals, clipped where a ReLU clips them (appendix C of the paper), see
    :mod:`qtrain.ptq.bn_propagation`. It neglects the rounding of the input itself, and padding at borders. Of a layer
    that is called more than once, ``E[x]`` is the mean over its calls.
    """

    needs_images = False

    @torch.no_grad()
    def __call__(
        self, student: nn.Module, images: Sequence[Tensor], statistics: Mapping[str, OutputStatistics]
    ) -> None:
        layers = _correctable(student)
        inputs = follow(student, statistics)
        skipped = Skipped("bias is not corrected")
        for name, layer in layers.items():
            if name not in inputs:
                skipped.add(name, "the layer is inside a module that cannot be traced, so that its input is not known")
            elif isinstance(layer, QuantConvTranspose):
                skipped.add(name, "a transposed convolution sums over other taps at each place")
            else:
                assert layer.bias is not None
                layer.bias.sub_(product_mean(layer, _weight_error(layer), expected(inputs[name])))
        skipped.log()


@final
class FromBatches(BiasCorrection):
    """``E[y~] - E[y]`` as measured on images, ``E[y]`` of the same model in full precision (appendix D of the paper).

    All images are run as one batch, once in full precision and once quantized, which takes the memory of such a batch.
    So each layer is corrected before the next one reads its output. A layer that is called more than once is left
    unchanged, because each of its calls shifts by another amount and they have one bias.
    """

    needs_images = True

    @torch.no_grad()
    def __call__(
        self, student: nn.Module, images: Sequence[Tensor], statistics: Mapping[str, OutputStatistics]
    ) -> None:
        if not images:
            raise ValueError("quantize.bias: there is no image to correct by; give images, or take bias=statistics")
        layers = _correctable(student)
        batch = torch.cat(list(images))
        wanted: dict[str, Tensor] = {}
        skipped = Skipped("bias is not corrected")

        def remember(name: str, layer: Correctable, output: Tensor) -> None:
            if name in wanted and name in layers:
                skipped.add(name, "the layer is called more than once, and each call shifts by another amount")
                del layers[name]
            wanted[name] = _channel_mean(layer, output)

        def correct(name: str, layer: Correctable, output: Tensor) -> Tensor:
            shift = _channel_mean(layer, output) - wanted[name]
            assert layer.bias is not None
            layer.bias.sub_(shift)
            return output - (shift if isinstance(layer, QuantLinear) else shift.reshape(-1, *_ones(output, 2)))

        with switched_off(quantizers_of(student).values()):
            _run(student, batch, layers, remember)
        skipped.log()
        _run(student, batch, layers, correct)


def _correctable(student: nn.Module) -> dict[str, Correctable]:
    """Layers of ``student`` with a rounded weight and a bias of their own; those with another's or none are logged."""
    layers, skipped = {}, Skipped("bias is not corrected")
    shared = shared_tensors(student)
    for name, layer in quant_layers(student).items():
        if isinstance(layer, Operand | QuantEmbedding) or layer.weight_quantizer is None:
            continue
        if (reason := why_shared(shared, name, "bias")) is not None:
            skipped.add(name, reason)
        elif layer.bias is None:
            skipped.add(name, "the layer has no bias; quantize.fold=before gives it that of the batch norm behind it")
        else:
            layers[name] = layer
    skipped.log()
    return layers


def _weight_error(layer: Correctable) -> Tensor:
    """``Q(W) - W``, (O, I / groups, ...), of the effective weight."""
    rounded = quantized_weight(layer)
    with switched_off([layer.weight_quantizer]):
        return rounded - quantized_weight(layer)


def _channel_mean(layer: Correctable, output: Tensor) -> Tensor:
    """Mean of each output channel, (O,), over samples and positions."""
    channels = output.flatten(0, -2) if isinstance(layer, QuantLinear) else output.transpose(0, 1).flatten(1).t()
    return channels.double().mean(dim=0).to(output)


def _ones(output: Tensor, axes: int) -> tuple[int, ...]:
    return (1,) * (output.ndim - axes)


def _run(student: nn.Module, batch: Tensor, layers: Mapping[str, Correctable], look: Look) -> None:
    """A forward in eval mode that calls ``look`` with the output of each of ``layers``, and may replace the output."""
    with ExitStack() as hooks, evaluating(student):
        for name, layer in layers.items():
            hook = layer.register_forward_hook(lambda layer, _, output, name=name: look(name, layer, output))
            hooks.enter_context(hook)
        student(batch)
