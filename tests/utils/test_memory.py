"""How many bytes hang on a value, and how many a process has held."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from qtrain.utils.memory import held_bytes, peak_bytes


def test_tensors_and_arrays_are_found_wherever_they_hang() -> None:
    hung = {"list": [torch.zeros(3)], "in": SimpleNamespace(array=np.zeros((5, 2))), "say": (lambda held: held)}
    assert held_bytes(hung) == 3 * 4 + 10 * 8


def test_a_network_has_the_bytes_of_its_parameters_and_buffers() -> None:
    """6 weights, 2 biases; of the norm 8 numbers and a counter of 8 bytes."""
    assert held_bytes(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))) == (8 + 8) * 4 + 8


def test_what_several_share_counts_once_and_a_view_as_the_whole_that_it_keeps() -> None:
    numbers, whole = np.zeros(100), torch.zeros(100)
    shared = {
        "views": [numbers[:10], numbers[5:]],
        "slices": [whole[:1], whole[1:2]],
        "same": torch.from_numpy(numbers),
    }
    assert held_bytes(shared) == 100 * 8 + 100 * 4


def test_the_peak_grows_with_what_is_held() -> None:
    before = peak_bytes()
    held = np.ones(50_000_000, dtype=np.uint8)
    assert peak_bytes() >= max(before, held.nbytes)
