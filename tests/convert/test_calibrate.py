"""Observers of what quantizers round."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from qtrain.convert.plan import observer_for
from qtrain.observers.squared_error import SquaredError
from qtrain.quantizers.uniform.affine import Affine
from qtrain.quantizers.uniform.lsq_plus import LSQPlus
from qtrain.spec import QuantSpec


@pytest.mark.parametrize(("make", "bits"), [(LSQPlus, 2), (LSQPlus, 4), (partial(Affine, symmetric=False), 5)])
def test_the_observer_of_shifted_codes_looks_for_these(make: Any, bits: int) -> None:
    """Behind hard swish most values are above zero, so codes about zero would be half empty."""
    x = F.hardswish(2 * torch.randn(64, 8, 6, 6, generator=torch.Generator().manual_seed(0)))
    errors = []
    for told in (True, False):
        quantizer = make(spec=QuantSpec(bits=bits)).eval()
        observer = observer_for(quantizer, SquaredError) if told else SquaredError(granularity=quantizer.granularity)
        observer.update(x)
        quantizer.calibrate_(observer.observed(bits))
        errors.append(float((quantizer(x) - x).square().mean()))
    assert errors[0] < 0.8 * errors[1]


def test_codes_about_zero_are_looked_for_as_told() -> None:
    quantizer = Affine(spec=QuantSpec(bits=4))
    told = observer_for(quantizer, partial(SquaredError, symmetric=False))
    assert isinstance(told, SquaredError) and not told.symmetric
    assert observer_for(quantizer, SquaredError).symmetric  # type: ignore[attr-defined]
