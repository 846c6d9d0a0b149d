"""Quantized gradients: modules behind a layer that are the identity forward and round the gradient backward."""

from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor, nn

from qtrain.functional.random import keyed_uniform
from qtrain.functional.ranks import largest_of_ranks, place_in_batch
from qtrain.functional.ste import with_gradient_rule
from qtrain.functional.stochastic import stochastic_round
from qtrain.spec import Granularity, PerSample, PerTensor


def largest_magnitude(grad: Tensor, granularity: Granularity) -> Tensor:
    """``max|grad|`` of each group, in float32, of ``granularity``'s state shape for ``grad``; 0 of empty groups."""
    shape = granularity.state_shape(tuple(grad.shape))
    if grad.numel() == 0:
        return grad.new_zeros(shape, dtype=torch.float32)
    return granularity.flatten(grad.float().abs()).amax(dim=1).reshape(shape)


def dorefa_gradient(grad: Tensor, key: Tensor, bits: Tensor) -> Tensor:
    """``2 m (quantize_k(g / (2 m) + 1/2 + N(k)) - 1/2)``, ``m = max|g|`` of each sample (arXiv 1606.06160, eq. 12).

    ``N(k) = sigma / (2^k - 1)`` with ``sigma`` uniform in [-1/2, 1/2), drawn for each element: this noise before
    rounding makes ``g`` the result's expectation. ``grad`` (N, ...); shape and dtype are kept, and a sample of zeros
    stays zero.
    """
    largest = largest_magnitude(grad, PerSample() if grad.ndim else PerTensor())
    steps = torch.exp2(bits.float()) - 1
    noise = keyed_uniform(key, tuple(grad.shape), first=place_in_batch(grad)) - 0.5
    share = grad.float() / (2 * torch.where(largest > 0, largest, 1.0))
    codes = ((share + 0.5) * steps + noise).round()
    codes = torch.minimum(codes.clamp(min=0), steps)
    return (2 * largest * (codes / steps - 0.5)).to(grad.dtype)


def integer_gradient(grad: Tensor, key: Tensor, bits: Tensor, granularity: Granularity) -> Tensor:
    """``s stochastic_round(g / s)``, ``s = max|g| / (2^(k-1) - 1)`` of each group: symmetric codes of ``bits`` bits.

    The result's expectation is ``grad``; shape and dtype are kept.
    """
    largest = largest_magnitude(grad, granularity)
    if isinstance(granularity, PerTensor):
        largest = largest_of_ranks(largest)
    scale = torch.where(largest > 0, largest, 1.0) / (torch.exp2(bits.float() - 1) - 1)
    drawn = keyed_uniform(key, tuple(grad.shape), first=place_in_batch(grad))
    codes = stochastic_round(grad.float() / scale, drawn)
    return (codes * scale).to(grad.dtype)


class GradientQuantizer(nn.Module, ABC):
    """Base of gradient quantizers: stands behind a layer, so that both of the layer's backward products see few bits.

    Forward: the input, bit for bit. Backward, in training mode: the incoming gradient, quantized; in eval mode it is
    left as it is. Draws are a function of the step's key and the element's place in the batch. ``bits`` is a buffer.
    Subclasses are final.
    """

    bits: Tensor
    key: Tensor

    def __init__(self, *, bits: int) -> None:
        super().__init__()
        if not 2 <= bits <= 16:
            raise ValueError(f"{type(self).__name__}: bits must be in 2..16, got {bits}; gradient=none leaves it exact")
        self.register_buffer("bits", torch.tensor(bits))
        self.register_buffer("key", torch.zeros((), dtype=torch.int64), persistent=False)

    @final
    def begin_step_(self, *, progress: float, key: int) -> None:
        """Take the step's key for random draws; see ``qtrain.quantizers.hooks``."""
        self.key.fill_(key)

    @final  # type: ignore[misc] # nn.Module declares forward as an attribute
    def forward(self, x: Tensor) -> Tensor:
        return with_gradient_rule(x, self.rule, self.key, self.bits) if self.training else x

    @abstractmethod
    def rule(self, grad: Tensor, key: Tensor, bits: Tensor) -> Tensor:
        """``grad`` quantized to ``bits`` bits, of the same shape and dtype."""

    @final
    def extra_repr(self) -> str:
        return f"bits={int(self.bits)}"


@final
class DoReFaGradient(GradientQuantizer):
    """DoReFa-Net's gradient quantization (Zhou et al. 2016, arXiv 1606.06160, §2.5): :func:`dorefa_gradient`."""

    def __init__(self, *, bits: int = 6) -> None:
        super().__init__(bits=bits)

    def rule(self, grad: Tensor, key: Tensor, bits: Tensor) -> Tensor:
        return dorefa_gradient(grad, key, bits)


@final
class IntegerGradient(GradientQuantizer):
    """Integers with a shared scale, rounded stochastically, as in 8-bit training: :func:`integer_gradient`.

    Banner et al. 2018 (arXiv 1805.11046) and Zhu et al. 2020 (arXiv 1912.12607) train with such gradients. The scale is
    that of the whole batch or, with ``PerSample``, of each sample.
    """

    def __init__(self, *, bits: int = 8, granularity: Granularity = PerTensor()) -> None:  # noqa: B008 - frozen
        super().__init__(bits=bits)
        if not isinstance(granularity, PerTensor | PerSample):
            raise ValueError(f"IntegerGradient: granularity must be tensor or sample, got {granularity}; choose one")
        self.granularity = granularity

    def rule(self, grad: Tensor, key: Tensor, bits: Tensor) -> Tensor:
        return integer_gradient(grad, key, bits, self.granularity)
