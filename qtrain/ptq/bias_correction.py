"""Bias correction: rounding moves the mean of each channel of a layer's output, and the bias takes that back.

``E[y~] - E[y]`` is subtracted from the bias of each output channel (Nagel et al. 2019, arXiv 1906.04721, §4.2). It
comes from the statistics of batch norm, with no image, or from images. Weights that learned rounding has put on their
grid already have no error left that could be seen here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from qtrain.convert.fold import OutputStatistics
from qtrain.convert.graph import Skipped
from qtrain.convert.layers import quant_layers, set_quantization
from qtrain.nn import Operand, QuantConv, QuantConvTranspose, QuantEmbedding, QuantLinear
from qtrain.nn.base import quantized_weight
from qtrain.ptq.bn_propagation import expected, follow, product_mean
from qtrain.utils.eval_mode import evaluating

Correctable = QuantConv | QuantConvTranspose | QuantLinear
Look = Callable[[str, Correctable, Tensor], Tensor | None]


class BiasCorrection(ABC):
    """Base of corrections; subclasses are final. ``needs_images`` is false for those that go by statistics alone."""

    needs_images: ClassVar[bool] = True

    @abstractmethod
    def __call__(
        self, student: nn.Module, images: Sequence[Tensor], statistics: Mapping[str, OutputStatistics]
    ) -> None:
        """Correct the biases of ``student``, converted and calibrated, in place.

        ``images`` are batches (N, C, H, W); ``statistics`` are those of :func:`qtrain.convert.fold.fold_batchnorm_`.
        A layer without a bias of its own is left, which is logged. Raises ``ValueError`` where there is nothing to
        correct by.
        """


@final
class FromStatistics(BiasCorrection):
    """``E[y~] - E[y] = (Q(W) - W) E[x]``, with the input's mean from batch norm's statistics alone (§4.2.1).

    ``E[x]`` is that of normals, clipped where a ReLU clips them (appendix C of the paper), see
    :mod:`qtrain.ptq.bn_propagation`. It is the input's before its own rounding, and the same at borders that are
    padded.
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

    All images are run as one batch, so that each layer is corrected before the next one sees its output: one forward in
    full precision, one quantized, both with the memory that a batch of that size takes.
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

        def remember(name: str, layer: Correctable, output: Tensor) -> None:
            wanted.setdefault(name, _channel_mean(layer, output))

        def correct(name: str, layer: Correctable, output: Tensor) -> Tensor | None:
            if name not in wanted:  # called before, and corrected then
                return None
            shift = _channel_mean(layer, output) - wanted.pop(name)
            assert layer.bias is not None
            layer.bias.sub_(shift)
            return output - (shift if isinstance(layer, QuantLinear) else shift.reshape(-1, *_ones(output, 2)))

        set_quantization(student, enabled=False)
        try:
            _run(student, batch, layers, remember)
        finally:
            set_quantization(student, enabled=True)
        _run(student, batch, layers, correct)


def _correctable(student: nn.Module) -> dict[str, Correctable]:
    """Layers of ``student`` whose weight is rounded, and that have a bias; the others of them are logged."""
    layers, skipped = {}, Skipped("bias is not corrected")
    for name, layer in quant_layers(student).items():
        if isinstance(layer, Operand | QuantEmbedding) or layer.weight_quantizer is None:
            continue
        if layer.bias is None:
            skipped.add(name, "the layer has no bias; quantize.fold=before gives it that of the batch norm behind it")
        else:
            layers[name] = layer
    skipped.log()
    return layers


def _weight_error(layer: Correctable) -> Tensor:
    """``Q(W) - W``, (O, I / groups, ...), of the weight that is multiplied."""
    assert layer.weight_quantizer is not None
    rounded = quantized_weight(layer)
    layer.weight_quantizer.enabled = False
    plain = quantized_weight(layer)
    layer.weight_quantizer.enabled = True
    return rounded - plain


def _channel_mean(layer: Correctable, output: Tensor) -> Tensor:
    """Mean of each output channel, (O,), over samples and places."""
    channels = output.flatten(0, -2) if isinstance(layer, QuantLinear) else output.transpose(0, 1).flatten(1).t()
    return channels.double().mean(dim=0).to(output)


def _ones(output: Tensor, axes: int) -> tuple[int, ...]:
    return (1,) * (output.ndim - axes)


def _run(student: nn.Module, batch: Tensor, layers: Mapping[str, Correctable], look: Look) -> None:
    """A forward in eval mode in which ``look`` sees the output of each of ``layers``, and may return another."""
    handles = [
        layer.register_forward_hook(lambda layer, _, output, name=name: look(name, layer, output))
        for name, layer in layers.items()
    ]
    try:
        with evaluating(student):
            student(batch)
    finally:
        for handle in handles:
            handle.remove()
