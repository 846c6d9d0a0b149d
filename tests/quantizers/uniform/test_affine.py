"""The affine quantizer: its zero point when the range is rescaled."""

import pytest
import torch

from qtrain.quantizers.uniform.affine import Affine
from qtrain.spec import PerChannel, QuantSpec

SHAPE = (4, 2)


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.7, 2.0, 4.0])
def test_rescaled_zero_point_keeps_the_lowest_value(factor: float) -> None:
    """Codes 0 to 15 mean ``(code - z) s``: the lowest value ``-z s`` stays, to half of the new step, while z fits."""
    quantizer = Affine(spec=QuantSpec(bits=4, shape=SHAPE, signed=True), granularity=PerChannel(), symmetric=False)
    before = torch.tensor([0.0, 3.0, 7.0, 6.0]).reshape(4, 1)
    quantizer.scale.fill_(0.1)
    quantizer.zero_point.copy_(before)
    assert quantizer.rescale_(torch.full((4, 1), factor)) == {}
    z, step = quantizer.zero_point.flatten(), 0.1 * factor
    torch.testing.assert_close(quantizer.scale.flatten(), torch.full((4,), step))
    assert torch.equal(z, z.round()) and float(z.min()) >= 0 and float(z.max()) <= 15
    assert bool(((-z * step + before.flatten() * 0.1).abs() <= 0.5 * step + 1e-6).all())
    assert float(z[2]) == round(7 / factor)
    lowest = quantizer(torch.full(SHAPE, -100.0))[:, 0]
    torch.testing.assert_close(lowest, -z * step)


def test_rescaled_zero_point_stays_a_code() -> None:
    quantizer = Affine(spec=QuantSpec(bits=4, shape=SHAPE, signed=True), symmetric=False)
    quantizer.zero_point.fill_(12.0)
    quantizer.rescale_(torch.tensor(0.25))
    assert float(quantizer.zero_point) == 15.0
