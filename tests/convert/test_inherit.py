"""What one stage's student takes over from the one before."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from qtrain.convert.calibrate import calibrate
from qtrain.convert.inherit import inherit_quantizers_, inherit_weights_, student_state_of
from qtrain.convert.layers import find_layers, quantizers_of
from qtrain.convert.plan import LayerPlan, plan_layers
from qtrain.convert.swap import swap_layers
from qtrain.observers.min_max import MinMax
from qtrain.quantizers.base import MakeQuantizer
from qtrain.quantizers.uniform.affine import Affine
from qtrain.quantizers.uniform.lsq import LSQ
from qtrain.quantizers.wrappers.blend import Blend
from qtrain.quantizers.wrappers.incremental import Incremental
from qtrain.spec import LayerBits

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network(width: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.Linear(36 * width, 2)
    )


def student(
    bits: int, quantizer: MakeQuantizer = LSQ, width: int = 4, *, weight: MakeQuantizer | None = None
) -> nn.Sequential:
    model = network(width)
    found = find_layers(model, IMAGES[:1])
    observer = partial(MinMax)
    recipe = LayerPlan(weight=weight or quantizer, input=quantizer, weight_observer=observer, input_observer=observer)
    plans = plan_layers(found, {name: LayerBits(bits, bits) for name in found.layers}, recipe, None)
    swap_layers(model, found, plans)
    calibrate(model, [IMAGES], plans)
    return model


def trained(bits: int) -> nn.Sequential:
    """Another state than calibration's, in every tensor that a training changes."""
    model = student(bits)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
        model.get_buffer("1.running_mean").add_(0.5)
    return model


def test_inheriting_with_equal_settings_gives_the_same_student() -> None:
    before, after = trained(4), student(4)
    student_state = student_state_of(before)
    inherit_weights_(after, student_state)
    assert inherit_quantizers_(after, student_state) == {}
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor, after.state_dict()[name]), name
    assert torch.equal(before.eval()(IMAGES), after.eval()(IMAGES))


def test_inherit_quantizers_returns_the_bits_to_switch_to() -> None:
    before, after = trained(8), student(2)
    inherit_weights_(after, student_state_of(before))
    wanted = inherit_quantizers_(after, student_state_of(before))
    assert wanted == {"0": LayerBits(2, 2), "4": LayerBits(2, 2)}
    assert {int(quantizer.bits) for quantizer in quantizers_of(after).values()} == {8}
    assert torch.equal(before.eval()(IMAGES), after.eval()(IMAGES)), "until they are switched nothing changes"


def test_quantizer_of_another_kind_keeps_its_calibration() -> None:
    before, after = trained(4), student(4, Affine)
    scale = after.get_buffer("0.weight_quantizer.scale").clone()
    inherit_weights_(after, student_state_of(before))
    assert inherit_quantizers_(after, student_state_of(before)) == {}
    assert torch.equal(after.get_parameter("0.weight"), before.get_parameter("0.weight"))
    assert torch.equal(after.get_buffer("0.weight_quantizer.scale"), scale)


def test_wrapper_around_another_quantizer_keeps_its_calibration() -> None:
    """LSQ and Affine have states of the same names and shapes; that of one is no state of the other."""
    around: list[MakeQuantizer] = [partial(Blend, share=0.5, quantizer=inner) for inner in (Affine, LSQ)]
    before, after = (student(4, weight=make) for make in around)
    key = "0.weight_quantizer.inner.scale"
    scale = after.state_dict()[key].clone()
    assert not torch.equal(scale, before.state_dict()[key])
    assert inherit_quantizers_(after, student_state_of(before)) == {}
    assert torch.equal(after.state_dict()[key], scale)


def test_quantizer_whose_bits_cannot_change_takes_over_a_state_of_the_same_bits_alone() -> None:
    make: MakeQuantizer = partial(Incremental, share=0.5, quantizer=Affine)
    before, same, fewer = (student(bits, weight=make) for bits in (8, 8, 2))
    key = "4.weight_quantizer.inner.scale"
    with torch.no_grad():
        before.state_dict()[key].mul_(1.25)
    scale = fewer.state_dict()[key].clone()
    for after in (same, fewer):
        inherit_quantizers_(after, student_state_of(before))
    assert torch.equal(same.state_dict()[key], before.state_dict()[key])
    assert torch.equal(fewer.state_dict()[key], scale)
    assert int(fewer.get_buffer("4.weight_quantizer.bits")) == 2


def test_full_precision_student_inherits_and_passes_on_weights() -> None:
    float_student, after = network(), student(4)
    inherit_weights_(float_student, student_state_of(trained(4)))
    assert torch.equal(float_student.get_parameter("0.weight"), trained(4).get_parameter("0.weight"))
    inherit_weights_(after, student_state_of(float_student))
    assert torch.equal(after.get_parameter("4.weight"), float_student.get_parameter("4.weight"))


def test_student_state_is_a_copy() -> None:
    before = trained(4)
    student_state = student_state_of(before)
    kept = student_state.tensors["0.weight"].clone()
    with torch.no_grad():
        before.get_parameter("0.weight").zero_()
    assert torch.equal(student_state.tensors["0.weight"], kept)


def test_inheriting_from_another_network_is_refused() -> None:
    with pytest.raises(ValueError, match=r"stages: .*must have the same model"):
        inherit_weights_(student(4, width=8), student_state_of(trained(4)))


def test_bits_of_layers_with_one_weight_differ_together() -> None:
    """They share a quantizer, whose bits are those of the earlier stage for both once the first took them over."""

    def tied(bits: int) -> nn.Sequential:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3))
        model[1].weight = model[0].weight
        found = find_layers(model, IMAGES[:1])
        recipe = LayerPlan(weight=LSQ, input=LSQ, weight_observer=MinMax, input_observer=MinMax)
        plans = plan_layers(found, {name: LayerBits(bits, 8) for name in found.layers}, recipe, None)
        swap_layers(model, found, plans)
        calibrate(model, [IMAGES], plans)
        return model

    now = tied(3)
    assert inherit_quantizers_(now, student_state_of(tied(5))) == dict.fromkeys("01", LayerBits(3, 8))


def test_the_message_about_another_network_has_the_shapes_of_the_tensor_that_it_names() -> None:
    for hidden in range(3, 11):  # an order of names by chance would be right for a few of them
        one = nn.Sequential(nn.Linear(2, hidden), nn.Linear(hidden, 5))
        other = nn.Sequential(nn.Linear(2, 2 * hidden), nn.Linear(2 * hidden, 5))
        expected = rf"has '0\.bias' of shape \({hidden},\), the one before \({2 * hidden},\)"
        with pytest.raises(ValueError, match=expected):
            inherit_weights_(one, student_state_of(other))
