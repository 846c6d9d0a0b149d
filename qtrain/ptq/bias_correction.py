"""Bias correction: rounding shifts the mean of each output channel of a layer, and the bias undoes that.

``E[y~] - E[y]`` is subtracted from the bias of each output channel (Nagel et al. 2019, arXiv 1906.04721, §4.2). It is
computed from the statistics of batch norm without images, or from images. What counts as full precision is the student
as it was before its weights were rounded, by SQuant or AdaRound for instance, which leave weights on the grid.
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
        self,
        student: nn.Module,
        images: Sequence[Tensor],
        statistics: Mapping[str, OutputStatistics],
        *,
        exact: nn.Module | None = None,
    ) -> None:
        """Correct the biases of ``student``, converted and calibrated, in place.

        ``images`` are batches (N, C, H, W); ``statistics`` are those of :func:`qtrain.convert.fold.fold_batchnorm_`.
        ``exact`` is the student with its weights from before they were rounded; ``None``: they were not.
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
        self,
        student: nn.Module,
        images: Sequence[Tensor],
        statistics: Mapping[str, OutputStatistics],
        *,
        exact: nn.Module | None = None,
    ) -> None:
        layers = _correctable(student)
        own = quant_layers(student if exact is None else exact)
        unrounded = {name: layer for name, layer in own.items() if isinstance(layer, Correctable)}
        inputs = follow(student, statistics)
        skipped = Skipped("bias is not corrected")
        for name, layer in layers.items():
            if name not in inputs:
                skipped.add(name, "the layer is inside a module that cannot be traced, so that its input is not known")
            elif isinstance(layer, QuantConvTranspose):
                skipped.add(name, "a transposed convolution sums over other taps at each place")
            else:
                assert layer.bias is not None
                error = quantized_weight(layer) - _exact_weight(unrounded[name])
                layer.bias.sub_(product_mean(layer, error, expected(inputs[name])))
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
        self,
        student: nn.Module,
        images: Sequence[Tensor],
        statistics: Mapping[str, OutputStatistics],
        *,
        exact: nn.Module | None = None,
    ) -> None:
        if not images:
            raise ValueError("quantize.bias: there is no image to correct by; give images, or take bias=statistics")
        layers = _correctable(student)
        if len({image.shape[1:] for image in images}) > 1:
            raise ValueError("quantize.bias: images of one size are needed, since all run as one batch")
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

        unrounded = student if exact is None else exact
        with switched_off(quantizers_of(unrounded).values()):
            _run(unrounded, batch, layers, remember)
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


def _exact_weight(layer: Correctable) -> Tensor:
    """``W``, (O, I / groups, ...): the effective weight without its quantizer."""
    with switched_off([layer.weight_quantizer]):
        return quantized_weight(layer)


def _channel_mean(layer: Correctable, output: Tensor) -> Tensor:
    """Mean of each output channel, (O,), over samples and positions."""
    channels = output.flatten(0, -2) if isinstance(layer, QuantLinear) else output.transpose(0, 1).flatten(1).t()
    return channels.double().mean(dim=0).to(output)


def _ones(output: Tensor, axes: int) -> tuple[int, ...]:
    return (1,) * (output.ndim - axes)


def _run(student: nn.Module, batch: Tensor, layers: Mapping[str, Correctable], look: Look) -> None:
    """A forward in eval mode that calls ``look`` with the output of each of ``layers``, and may replace the output.

    They are those of ``student`` of these names, ``look`` gets those given.
    """
    with ExitStack() as hooks, evaluating(student):
        for name, layer in layers.items():
            own = student.get_submodule(name)
            hook = own.register_forward_hook(lambda _, __, output, name=name, layer=layer: look(name, layer, output))
            hooks.enter_context(hook)
        student(batch)
