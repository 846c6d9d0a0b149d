"""Logits kept exactly, or their largest in 16 bits: what comes back, how far off it may be, and how large it is."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qtrain.distill.logit_format import Full, LogitFormat, TopK


def logits(n: int, classes: int, spread: float) -> Tensor:
    return spread * torch.randn(n, classes, generator=torch.Generator().manual_seed(classes))


def round_trip(keeps: LogitFormat, z: Tensor) -> Tensor:
    rows = keeps.encode(z)
    for name, column in keeps.columns.items():
        assert (rows[name].dtype, tuple(rows[name].shape)) == (column.dtype, (len(z), column.width))
    return keeps.decode(rows)


def test_full_is_exact() -> None:
    z = logits(5, 7, 3.0)
    assert torch.equal(round_trip(Full(num_classes=7), z), z)
    assert Full(num_classes=7).bytes_a_sample() == 28


def test_top_k_by_hand() -> None:
    """Probabilities 1/2, 1/4, 1/8, 1/16, 1/16 with two kept: the rest, a quarter, is three times a twelfth."""
    p = torch.tensor([[1 / 16, 1 / 2, 1 / 8, 1 / 4, 1 / 16]])
    rows = TopK(num_classes=5, k=2).encode(p.log() + 3.0)
    assert rows["classes"].tolist() == [[1, 3]]
    assert rows["log_probs"].float().exp().tolist() == [pytest.approx([1 / 2, 1 / 4, 1 / 12], rel=2e-3)]
    decoded = TopK(num_classes=5, k=2).decode(rows)
    assert decoded.softmax(1).tolist() == [pytest.approx([1 / 12, 1 / 2, 1 / 12, 1 / 4, 1 / 12], rel=2e-3)]


@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0, 40.0])
@pytest.mark.parametrize(("classes", "k"), [(2, 1), (10, 1), (10, 5), (10, 9), (1000, 5)])
def test_top_k_is_within_its_bound(classes: int, k: int, spread: float) -> None:
    """All of it in float64; the bound holds for every sample and temperature, and is not idle."""
    z = logits(64, classes, spread)
    teacher, replay = z.double(), round_trip(TopK(num_classes=classes, k=k), z).double()
    rounding = 2**-11 * (1 + math.log(classes))
    largest = teacher.topk(k, dim=1).indices
    for temperature in (1.0, 2.0, 8.0):
        p, q = (teacher / temperature).softmax(1), (replay / temperature).softmax(1)
        distance = (p - q).abs().sum(1) / 2
        outside = 1 - q.gather(1, largest).sum(1)
        assert (distance <= outside + rounding).all()
        if classes - k > 1 and spread in (1.0, 5.0):
            assert (distance > 0.02 * outside).any(), "a bound that is never near says nothing"
        if classes - k == 1:
            assert (distance <= rounding).all(), "one class left over is no guess"
    p, log_p, log_q = teacher.softmax(1), teacher.log_softmax(1), replay.log_softmax(1)
    rest = 1 - p.gather(1, largest).sum(1)
    divergence = (p * (log_p - log_q)).sum(1)
    assert (divergence <= rest * math.log(classes - k) + 2 * rounding).all()


def test_top_k_of_a_teacher_that_is_sure() -> None:
    """``1 - sum(top)`` would be 0 here; and what float16 cannot hold stays finite."""
    z = torch.tensor([[40.0, 0.0, -1.0, -2.0], [3e5, 0.0, 0.0, 0.0]])
    decoded = round_trip(TopK(num_classes=4, k=1), z)
    expected = torch.tensor([1.0, math.exp(-1), math.exp(-2)]).mean().log().item() - 40
    assert decoded[0, 1:].tolist() == pytest.approx([expected] * 3, rel=1e-3)
    assert decoded.isfinite().all()
    assert decoded.argmax(1).tolist() == [0, 0]


@pytest.mark.parametrize(("classes", "dtype"), [(256, torch.uint8), (257, torch.int16), (40000, torch.int32)])
def test_classes_are_kept_in_the_smallest_numbers_that_hold_them(classes: int, dtype: torch.dtype) -> None:
    keeps = TopK(num_classes=classes, k=2)
    z = logits(3, classes, 1.0)
    z[:, -1] = 50.0
    assert keeps.columns["classes"].dtype == dtype
    assert (round_trip(keeps, z).argmax(1) == classes - 1).all()
    assert keeps.bytes_a_sample() == 6 + 2 * dtype.itemsize


@pytest.mark.parametrize("keeps", [Full(num_classes=6), TopK(num_classes=6, k=2)])
def test_compiles_as_a_whole(keeps: LogitFormat) -> None:
    torch._dynamo.reset()
    z = logits(4, 6, 2.0)
    compiled = torch.compile(lambda x: keeps.decode(keeps.encode(x)), fullgraph=True, backend="eager")
    assert torch.equal(compiled(z), keeps.decode(keeps.encode(z)))


@pytest.mark.parametrize("k", [0, 10, 11])
def test_k_outside_the_classes_is_refused(k: int) -> None:
    message = f"TopK: k must be at least 1 and below the 10 classes, got {k}; teacher_cache=full"
    with pytest.raises(ValueError, match=message):
        TopK(num_classes=10, k=k)
