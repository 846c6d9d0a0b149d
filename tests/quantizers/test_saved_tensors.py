"""What a quantizer keeps for its backward pass: its input and nothing else of that size."""

from collections.abc import Callable
from functools import partial

import pytest
import torch

from qtrain.quantizers.base import Quantizer
from qtrain.quantizers.uniform.affine import Affine
from qtrain.quantizers.uniform.lsq import LSQ
from qtrain.quantizers.uniform.lsq_plus import LSQPlus
from qtrain.spec import Observed, QuantSpec
from qtrain.utils.saved_tensors import SavedTensors

KEEPS_INPUT_ALONE: dict[str, Callable[..., Quantizer]] = {
    "affine": Affine, "affine, asymmetric": partial(Affine, symmetric=False), "lsq": LSQ, "lsq_plus": LSQPlus,
}  # fmt: skip


@pytest.mark.parametrize("name", KEEPS_INPUT_ALONE)
def test_the_input_is_all_that_is_kept(name: str) -> None:
    quantizer = KEEPS_INPUT_ALONE[name](spec=QuantSpec(bits=4))
    x = torch.randn(2, 8, 16, 16, requires_grad=True)
    quantizer.calibrate_(Observed(torch.tensor(-2.0), torch.tensor(2.0), torch.tensor(1.0)))
    with SavedTensors(known=[x]) as saved:
        y = quantizer.train()(x)
    assert saved.bytes <= 64, "numbers of the quantizer's own, no tensor of the input's size"
    y.sum().backward()
    assert x.grad is not None


def test_each_storage_counts_once_and_known_ones_not_at_all() -> None:
    x, y = torch.ones(10, requires_grad=True), torch.ones(10, requires_grad=True)
    with SavedTensors(known=[x]) as saved:
        product = x * y
        again = product * y[:5].repeat(2)
    assert saved.bytes == 3 * 40, "y, the product, and the repeated half"
    again.sum().backward()
