"""Ranks before and around a fit, as one process can see it; several: tests/distributed."""

from __future__ import annotations

import pytest
import torch
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities import rank_zero_only

from qtrain.training import ranks


@pytest.mark.parametrize(
    ("asked", "devices", "nodes", "ours"),
    [
        ("auto", 1, 1, False),
        ("auto", "1", 1, False),
        ("auto", 2, 1, True),
        ("auto", 1, 2, True),
        ("ddp", -1, 1, True),
        ("ddp_spawn", 2, 1, False),
    ],
)
def test_strategy_for_several_processes_is_ddp_with_a_static_graph(
    asked: str, devices: int, nodes: int, ours: bool
) -> None:
    strategy = ranks.strategy_for(asked, devices=devices, nodes=nodes)
    if not ours:
        assert strategy == asked
        return
    assert isinstance(strategy, DDPStrategy)
    assert strategy._ddp_kwargs["static_graph"] is True


def test_strategy_with_accumulated_gradients_has_no_static_graph() -> None:
    strategy = ranks.strategy_for("auto", devices=2, nodes=1, accumulated=4)
    assert (strategy._ddp_kwargs["static_graph"], strategy._ddp_kwargs["find_unused_parameters"]) == (False, True)


def test_single_rank_does_not_wait_and_changes_nothing() -> None:
    model = torch.nn.Linear(2, 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ranks.wait_for_all()
    ranks.agree_(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("rank", "asked"), [(0, 0), (1, 4)])
def test_other_ranks_wait_until_the_first_is_ready(monkeypatch: pytest.MonkeyPatch, rank: int, asked: int) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", rank)
    monkeypatch.setattr(ranks, "POLL_S", 0.0)
    answers = iter([False, False, False, True])
    calls = []
    ranks.first_rank_first(lambda: calls.append(1) or next(answers), what="a test")  # type: ignore[func-returns-value]
    assert len(calls) == asked


def test_several_is_false_only_for_one_device_on_one_node() -> None:
    assert not ranks.several(devices=1, nodes=1)
    assert all(ranks.several(devices=d, nodes=n) for d, n in ((2, 1), (-1, 1), ("auto", 1), ([0, 1], 1), (1, 2)))
