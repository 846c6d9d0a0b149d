"""Students of several widths joined to one: what they share, and what each has of its own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import qtrain
from qtrain.convert.layers import quant_layers
from qtrain.convert.many_bits import join
from qtrain.nn.many_bits import ManyBits, by_width, in_use
from qtrain.quantizers.requantized import Requantized
from qtrain.utils.sharing import place_of
from tests.helpers.many_bits import WIDTHS, images, many_bits, network


@pytest.fixture
def student() -> ManyBits:
    return many_bits()


def test_layers_share_their_parameters_and_batch_norms_do_not(student: ManyBits) -> None:
    widest = student.at(8)
    for bits in WIDTHS[1:]:
        for name, module in student.at(bits).named_modules():
            theirs = widest.get_submodule(name) if not name.count("quantizer") else None
            if isinstance(module, nn.Conv2d | nn.Linear) and isinstance(theirs, nn.Module):
                assert module.weight is theirs.weight
                assert module.bias is theirs.bias
            if isinstance(module, nn.BatchNorm2d) and isinstance(theirs, nn.BatchNorm2d):
                assert module.weight is not theirs.weight
                assert place_of(module.running_mean) != place_of(theirs.running_mean)


def test_few_bits_are_those_of_what_the_widest_gives(student: ManyBits) -> None:
    wide, narrow = (quant_layers(student.at(bits))["3"] for bits in (8, 2))
    weight = wide.effective_weight()
    decoded = wide.weight_quantizer.quantize(weight).dequantize()
    assert isinstance(narrow.weight_quantizer, Requantized)
    expected = narrow.weight_quantizer.inner(decoded)
    assert torch.equal(narrow.weight_quantizer(weight), expected)
    assert torch.equal(narrow.weight_quantizer.quantize(weight).dequantize(), expected)
    assert len(narrow.weight_quantizer.quantize(weight).codes.unique()) <= 4
    assert int(wide.weight_quantizer.bits) == 8


def test_layer_of_the_same_bits_at_all_widths_has_one_weight_quantizer(student: ManyBits) -> None:
    for end in ("0", "7"):
        kept = {id(quant_layers(one)[end].weight_quantizer) for one in student.students.values()}
        assert len(kept) == 1


def test_a_step_trains_the_shared_weight_and_the_step_sizes_of_its_width(student: ManyBits) -> None:
    student.train()
    student.use_(4)
    student(images()).square().mean().backward()
    wide, four, two = (quant_layers(student.at(bits))["3"] for bits in WIDTHS)
    assert wide.weight.grad is not None
    assert four.weight_quantizer.inner.scale.grad is not None
    assert two.weight_quantizer.inner.scale.grad is None


def test_the_width_in_use_computes(student: ManyBits) -> None:
    student.eval()
    logits = {}
    for bits in WIDTHS:
        student.use_(bits)
        assert in_use(student) is student.at(bits)
        logits[bits] = student(images())
        assert torch.equal(logits[bits], student.at(bits)(images()))
    assert not torch.equal(logits[8], logits[2])
    assert list(by_width(student)) == list(WIDTHS)
    assert by_width(student.at(4)) == {None: student.at(4)}


def test_a_width_that_there_is_not_is_refused_in_one_line(student: ManyBits) -> None:
    with pytest.raises(ValueError, match=r"^bits: this student has 8, 4, 2 bits, not 3; take one$"):
        student.use_(3)
    assert student.bits == 8


def test_a_copy_shares_its_own_weights(student: ManyBits) -> None:
    copied = copy.deepcopy(student)
    wide, narrow = (quant_layers(copied.at(bits))["3"] for bits in (8, 2))
    assert narrow.weight is wide.weight
    assert narrow.weight is not quant_layers(student.at(2))["3"].weight
    assert narrow.weight_quantizer.first is wide.weight_quantizer


def test_students_of_other_weights_are_refused() -> None:
    one, other = (qtrain.quantize(network(), images(), weight_bits=bits) for bits in (8, 4))
    other.get_submodule("3").bias.data.add_(1.0)  # type: ignore[union-attr, operator]
    with pytest.raises(ValueError, match=r"^many_bits: (0\.weight|3\.bias) differs between the widths"):
        join({8: one, 4: other})


def test_one_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^ManyBits: needs at least two widths, got \[8\]"):
        join({8: qtrain.quantize(network(), images())})


def test_a_codebook_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^many_bits: KMeans keeps tables or masks for one width"):
        qtrain.quantize(network(), images(), widths=[4, 2], weight="kmeans")
