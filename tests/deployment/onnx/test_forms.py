"""Quantizers in the terms of ONNX: the same numbers, or a reason why there are none."""

import pytest
import torch
from torch import Tensor

from qtrain.deployment.onnx.forms import Codes, NoFormError, input_codes
from qtrain.deployment.onnx.weights import WeightCodes, finer, weight_codes
from qtrain.nn import QuantLayer, QuantWeighted
from qtrain.quantizers.base import Quantizer
from qtrain.settings.conf_dir import conf_dir
from tests.packed.students import KINDS, settings_with, student_of

NAMES = sorted(path.stem for path in (conf_dir() / "quantizer").glob("*.yaml"))

UNIFORM = {"affine", "blend", "dorefa", "duq", "lsq", "lsq_plus", "pact", "stochastic_rounding", "wrpn"}
SIGNS = {"bnn", "bnn_plus", "ir_net", "reste", "xnor"}
"""Quantizers of inputs that ONNX can express."""

SOMETIMES = {"qil"}
"""Those that it can express as long as they prune nothing."""


def quantizers(name: str, place: str) -> list[Quantizer]:
    """Calibrated quantizers ``name`` of the layers of a small network; none where it is not made for ``place``."""
    settings = settings_with(name, place)
    if settings is None:
        return []
    student, _ = student_of(KINDS, settings)
    layers = [layer for layer in student.modules() if isinstance(layer, QuantLayer)]
    found = [getattr(layer, f"{place}_quantizer") for layer in layers]
    return [quantizer for quantizer in found if quantizer is not None]


def as_onnx(x: Tensor, codes: Codes) -> Tensor:
    """QuantizeLinear, Clip and DequantizeLinear as the standard defines them, or a comparison and DequantizeLinear."""
    if codes.threshold is not None:
        signs = (x >= codes.threshold).to(torch.int64) << codes.shift
        return (signs - codes.shifted_zero_point.to(torch.int64)) * codes.step
    shifted = x if codes.offset is None else x - codes.offset
    held, zero = torch.iinfo(codes.dtype), codes.zero_point.to(torch.int64)
    stored = ((shifted / codes.scale).round() + zero).clamp(held.min, held.max)
    values = (stored.clamp(codes.low, codes.high) - zero) * codes.scale
    return values if codes.offset is None else values + codes.offset


@pytest.mark.parametrize("name", NAMES)
def test_inputs_have_the_same_numbers_in_onnx_or_a_reason(name: str) -> None:
    x = 3 * torch.randn(2, 24, 8, 8, generator=torch.Generator().manual_seed(1))
    expressed = set()
    for quantizer in quantizers(name, "input"):
        try:
            codes = input_codes(quantizer)
        except NoFormError as error:
            assert type(quantizer).__name__ in str(error)
            expressed.add(False)
        else:
            assert codes.dtype in (torch.uint8, torch.uint16)
            assert torch.iinfo(codes.dtype).min <= codes.low < codes.high <= torch.iinfo(codes.dtype).max
            torch.testing.assert_close(as_onnx(x, codes), quantizer(x).detach(), rtol=0, atol=1e-6)
            expressed.add(True)
    assert expressed in ({name in UNIFORM | SIGNS}, set()) or name in SOMETIMES


@pytest.mark.parametrize("name", NAMES)
def test_weights_have_the_same_numbers_as_codes_or_are_left_to_values(name: str) -> None:
    settings = settings_with(name, "weight")
    if settings is None:
        return
    student, _ = student_of(KINDS, settings)
    for layer in student.modules():
        if isinstance(layer, QuantWeighted) and layer.weight_quantizer is not None:
            stored = layer.weight_quantizer.quantize(layer.effective_weight())
            codes = weight_codes(stored)
            if codes is not None:
                axes = (-1, *(1 for _ in codes.codes.shape[1:]))
                values = (codes.codes - codes.zero_point.reshape(axes)) * codes.scale.reshape(axes)
                # DoReFa adds -1 in floating point, and APoT multiplies its levels, sums of powers of two, by a scale.
                absolute, relative = {"dorefa": (2.0**-23, 0.0), "apot": (0.0, 2.0**-22)}.get(name, (0.0, 0.0))
                torch.testing.assert_close(values, stored.dequantize(), rtol=relative, atol=absolute)


def test_a_weight_whose_codes_are_all_zero_stays_as_it_is() -> None:
    weight = WeightCodes(torch.zeros(2, 3, dtype=torch.int64), torch.ones(2), torch.zeros(2, dtype=torch.int64))
    assert not finer(weight).codes.any()
