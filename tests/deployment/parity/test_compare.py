"""Differing codes are counted, and told apart by their cause."""

import torch

from qtrain.deployment.parity.compare import Difference, Rounded, by_image, causes, counted


def test_each_differing_code_has_one_cause() -> None:
    expected = Rounded(torch.tensor([1, 2, 3, 4, 5, 6]), torch.tensor([0.3, 0.0005, 0.3, 0.3, 0.3, 0.3]))
    from_file = Rounded(torch.tensor([1, 2, 4, 4, 5, 6]), torch.tensor([0.3, 0.3, 0.3, 0.3, 0.3, 0.3]))
    found = torch.tensor([1, 3, 4, 6, 4, 7])
    masks = causes(expected, found, from_file, {"fused": torch.tensor([1, 2, 3, 6, 5, 7])})
    one = counted("conv", expected, found, masks)
    assert one == Difference("conv", elements=6, differing=5, steps=2, ties=1, biased=1, fused=1)
    assert one.unexplained == 2
    assert one.cause == (
        "1 ties at a half, 1 by biases in 32 bits, 1 by operations that the runtime fuses, 2 for no known reason"
    )
    assert (one + one).differing == 10 and (one + one).fused == 2 and (one + one).steps == 2


def test_equal_codes_have_no_cause() -> None:
    expected = Rounded(torch.tensor([1, 2]), torch.zeros(2))
    assert counted("conv", expected, expected.codes, causes(expected, expected.codes)) == Difference("conv", 2)
    assert Difference("conv", 2).cause == ""


def test_a_code_at_a_boundary_of_the_files_own_sums_is_the_biases_doing() -> None:
    expected = Rounded(torch.tensor([1, 2]), torch.tensor([0.3, 0.3]))
    from_file = Rounded(torch.tensor([1, 2]), torch.tensor([0.0001, 0.3]))
    masks = causes(expected, torch.tensor([2, 3]), from_file)
    assert masks["biased"].tolist() == [True, False]
    assert masks["unexplained"].tolist() == [False, True]


def test_differences_are_counted_by_image() -> None:
    mask = torch.tensor([[True, False], [True, True], [False, False], [False, True]])
    assert by_image(mask, 4).tolist() == [1, 2, 0, 1]
    assert by_image(mask, 2).tolist() == [3, 1]  # each image has two windows
    assert by_image(mask, 3).tolist() == [4, 4, 4]
