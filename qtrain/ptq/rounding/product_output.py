"""Product quantization by the error of a layer's output: codebooks that know what the layer multiplies."""

import logging
from collections.abc import Sequence
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtrain.convert.layers import quant_layers, switched_off
from qtrain.nn import Operand, QuantConv, QuantLayer, QuantLinear
from qtrain.nn.base import input_of
from qtrain.ptq.rounding.base import CannotRound, Rounding
from qtrain.ptq.rounding.reconstruction_units import in_order, record_part
from qtrain.quantizers.codebook.product import Product
from qtrain.quantizers.wrappers.wrapper import innermost
from qtrain.utils.eval_mode import evaluating
from qtrain.utils.progress import tracked
from qtrain.utils.sharing import shared_tensors, why_shared

log = logging.getLogger(__name__)

RIDGE = 1e-3
"""Added to the diagonal of a Gram matrix, relative to its mean, so that inputs that never vary do not make it
singular."""


def block_gram(layer: QuantConv | QuantLinear, x: Tensor, block: int) -> Tensor:
    """``X^T X / n``, (d, d) float64, of the ``block`` d neighboring inputs that a block of the weight multiplies.

    ``x`` is what the layer multiplies, (N, C, H, W) or (..., I). All blocks share the matrix, as in arXiv 1907.05686,
    §3.1, where a codebook serves all of them. Raises :class:`CannotRound` for a layer that does not multiply patches of
    its input by its weight.
    """
    if isinstance(layer, QuantLinear):
        rows = x.reshape(-1, block)
    else:
        padding = layer.padding
        if len(layer.kernel_size) != 2 or layer.pad is not None or layer.padding_mode != "zeros":
            raise CannotRound("it is no convolution over two axes that pads with zeros by itself")
        if isinstance(padding, str):
            raise CannotRound(f"its padding is {padding!r} and no number")
        unfold = F.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride)
        rows = unfold.transpose(1, 2).reshape(-1, block)
    return rows.double().T @ rows.double() / len(rows)


@final
class ProductOutput(Rounding):
    """The codebooks of ``quantizer@quantize.weight=product`` by the error of each layer's output (iPQ).

    Fan et al. 2020, arXiv 2004.07320, §3.2, with the clustering of Stock et al. 2020, arXiv 1907.05686, §3.1: layer
    after layer in the order of the forward, each with its input in the quantized model. A layer whose output would get
    no closer to that of its own weight keeps its codebook.
    """

    @torch.no_grad()
    def __call__(self, student: nn.Module, images: Sequence[Tensor], *, seed: int) -> None:
        if not images:
            raise ValueError("rounding: has no images to see outputs of; give at least one calibration batch")
        layers = {name: layer for name, layer in quant_layers(student).items() if _product(layer) is not None}
        if not layers:
            raise ValueError(
                "rounding: product_output clusters again what quantizer@quantize.weight=product has clustered; "
                "take that quantizer, or another rounding"
            )
        shared = shared_tensors(student)
        order, reasons = in_order(student, list(layers), images[0][:2])
        for name in tracked(order, total=len(order), title="codebooks", unit="layers"):
            try:
                if (reason := why_shared(shared, name, "weight")) is not None:
                    raise CannotRound(reason)
                with evaluating(student):
                    before, after = _cluster_(layers[name], record_part(student, name, images).inputs)
                log.info("%s: squared error of the output %.3g, by the output %.3g", name, before, after)
            except CannotRound as error:
                reasons[name] = str(error)
        for name, reason in reasons.items():
            log.warning("left with the codebook by the weight: %s: %s", name, reason)


def _product(layer: QuantLayer) -> Product | None:
    if isinstance(layer, Operand) or layer.weight_quantizer is None:
        return None
    core = innermost(layer.weight_quantizer)
    return core if isinstance(core, Product) else None


def _cluster_(layer: QuantLayer, inputs: Tensor) -> tuple[float, float]:
    """Cluster the weight of ``layer`` by its output for ``inputs``; the output's squared error before and after."""
    quantizer = _product(layer)
    assert quantizer is not None
    if not isinstance(layer, QuantConv | QuantLinear):
        raise CannotRound(f"a {type(layer).__name__} multiplies no patches of its input")
    x = input_of(layer, inputs)
    with switched_off([layer.weight_quantizer]):
        exact = layer(inputs)
        weight = layer.effective_weight()

    def error() -> float:
        return float((layer(inputs) - exact).square().mean())

    before, state = error(), {key: tensor.clone() for key, tensor in quantizer.state_dict().items()}
    gram = block_gram(layer, x, quantizer.block)
    ridge = RIDGE * gram.diagonal().mean()
    if not bool(ridge > 0):
        raise CannotRound("all of its inputs are zero")
    quantizer.cluster_by_(weight, gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
    after = error()
    if not after < before:
        quantizer.load_state_dict(state)
    return before, after
