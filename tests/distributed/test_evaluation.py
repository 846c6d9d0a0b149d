"""Each rank looks at its slice of the test images, and all get what one rank finds, image by image."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from subprocess import Popen

import pytest
import torch
from torch import nn

from qtrain.data.order import BatchOrder
from qtrain.spec import Batch
from qtrain.training.evaluation import evaluate

RANK = """
import json, sys
from pathlib import Path
import torch, torch.distributed as dist
from tests.distributed.test_evaluation import found_by
rank, ranks, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
(folder / f"{rank}.json").write_text(json.dumps(found_by(rank, ranks)))
dist.destroy_process_group()
"""


def found_by(rank: int, ranks: int) -> list[object]:
    """What a fixed model makes of 23 images in batches of 10, of which this rank has its slice."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    images, labels = torch.randn(23, 3, 2, 2), torch.arange(23) % 3
    order = BatchOrder(torch.arange(23), seed=0, batch_size=10, train=False, rank=rank, world_size=ranks)
    batches = [Batch(images[index], labels[index], index) for index in order.batches(epoch=0)]
    found = evaluate(model, batches, torch.device("cpu"))
    return [found.top1, found.loss, found.right.tolist()]


def test_ranks_find_what_one_rank_finds(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    ranks = [Popen([sys.executable, "-c", RANK, str(rank), "3", str(tmp_path)], cwd=root) for rank in range(3)]
    assert [process.wait(timeout=300) for process in ranks] == [0, 0, 0]
    top1, loss, right = found_by(0, 1)
    assert 0 < top1 < 100 and len(right) == 23
    for rank in range(3):
        several = json.loads((tmp_path / f"{rank}.json").read_text())
        assert (several[0], several[2]) == (top1, right)
        assert several[1] == pytest.approx(loss, rel=1e-6)
