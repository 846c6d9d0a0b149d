"""Few bits of a weight that is stored with more: for students of several widths, which share their weights."""

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor, nn

from qtrain.quantizers.base import Quantizer
from qtrain.quantizers.wrappers.wrapper import Wrapper
from qtrain.spec import Observed
from qtrain.storage.base import NumberPart, QTensor


@final
class Requantized(Wrapper):
    """``Q_b(Q(w))``: the narrow quantizer ``inner`` of what the wide quantizer ``first`` gives.

    So the codes of ``first`` are all that has to be stored of the weight, beside the state of ``inner``: whoever has
    both gets the values of ``b`` bits that were trained, bit for bit. ``inner`` is at hand already, with its own step
    for ``b`` bits, as the switchable clipping levels of AdaBits (Jin et al. 2020, arXiv 1912.09666, §3.3). ``first``
    belongs to the layer of the widest student and is not changed by this one.
    """

    inner: Quantizer

    def __init__(self, *, inner: Quantizer, first: Quantizer) -> None:
        super().__init__(spec=inner.spec, quantizer=lambda *, spec: inner)
        self.made_by = inner.made_by
        # In a list: a change of bits goes to children that are quantizers, and this one keeps its own.
        self.wide = nn.ModuleList([first])

    @property
    def first(self) -> Quantizer:
        """The quantizer of the widest student."""
        (found,) = self.wide
        assert isinstance(found, Quantizer)
        return found

    def fake_quantize(self, x: Tensor) -> Tensor:
        narrow: Tensor = self.inner(self.first(x))
        return narrow

    def quantize(self, x: Tensor) -> QTensor:
        return self.inner.quantize(self.first.quantize(x).dequantize())

    @torch.no_grad()
    def calibrate_(self, observed: Observed) -> None:
        self.inner.calibrate_(observed)
        self.follow_inner_()

    def stored_state(self) -> Mapping[str, NumberPart]:
        return self.inner.stored_state()
