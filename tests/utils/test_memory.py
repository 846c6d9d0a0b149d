"""How many bytes hang on a value, and how many a process has held."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from qtrain.utils.memory import held_bytes


def test_tensors_and_arrays_are_found_wherever_they_hang() -> None:
    closed, usual = torch.zeros(7), torch.zeros(2)
    hung = {
        "list": [torch.zeros(3)],
        "in": SimpleNamespace(array=np.zeros((5, 2))),
        "say": lambda more=usual: closed + more,
        "objects": np.array([torch.zeros(6), None], dtype=object),
    }
    assert held_bytes(hung) == (3 + 7 + 2 + 6) * 4 + 10 * 8 + 2 * 8


def test_a_network_has_the_bytes_of_its_parameters_buffers_and_gradients() -> None:
    """6 weights, 2 biases; of the norm 8 numbers and a counter of 8 bytes; the linear layer's 8 again."""
    network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    assert held_bytes(network) == (8 + 8) * 4 + 8
    network[0](torch.ones(1, 3)).sum().backward()
    assert held_bytes(network) == (8 + 8 + 8) * 4 + 8


def test_what_several_share_counts_once() -> None:
    numbers, whole = np.zeros(100), torch.zeros(100)
    same = torch.from_numpy(numbers)
    assert held_bytes([numbers[:10], numbers[5:], whole[:1], whole[1:2], same]) == 100 * 8 + 100 * 4


@pytest.mark.parametrize(
    "view", [torch.zeros(100, dtype=torch.float64)[:1], np.zeros(100)[:1], np.zeros(100).reshape(10, 10).T[1:]]
)
def test_a_view_counts_as_the_whole_that_it_keeps(view: object) -> None:
    assert held_bytes(view) == 100 * 8


def test_what_has_no_memory_of_its_own_counts_nothing() -> None:
    assert held_bytes([torch.ones(5, device="meta"), None, "text", np.float64(1)]) == 0
    assert held_bytes(torch.eye(3).to_sparse()) == 0


def test_the_peak_grows_with_what_is_held() -> None:
    """In a process of its own, since a peak never falls."""
    program = (
        "import numpy as np; from qtrain.utils.memory import peak_bytes; before = peak_bytes(); "
        "held = np.ones(200_000_000, dtype=np.uint8); print(peak_bytes() - before)"
    )
    grown = int(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)
    assert 100e6 < grown < 400e6
