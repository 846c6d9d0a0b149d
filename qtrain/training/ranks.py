"""Several processes that train one model: how gradients meet, who waits for whom, and what all agree on in the end.

Each rank takes its slice of every batch; gradients are averaged, so that the step is that of the whole batch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities import rank_zero_only
from torch import nn
from torch.distributed.tensor import DTensor

from qtrain.functional.ranks import world_size
from qtrain.training.sharded import ShardedStrategy

log = logging.getLogger(__name__)

POLL_S = 0.5


def several(*, devices: Any, nodes: int) -> bool:
    """Whether Lightning's trainer may come to have several processes; all devices there are may be one."""
    return nodes != 1 or devices not in (1, "1")


def strategy_for(asked: Any, *, devices: Any, nodes: int, accumulated: int = 1, shard: bool = False) -> Any:
    """What Lightning's trainer gets for ``asked``: with several processes, unless something else is named, DDP.

    Where these ``shard`` the student it is FSDP2.

    The graph of a step is the same every time, and DDP is told so: it finds out once which parameters the objective
    does not reach (those behind a hint, for one) and waits for none of them. Where gradients of several batches are
    ``accumulated`` it cannot learn that, since not every backward meets the other ranks, and looks for them each time.
    """
    if asked not in ("auto", "ddp") or not several(devices=devices, nodes=nodes):
        return asked
    if shard:
        return ShardedStrategy()
    same = accumulated == 1
    return DDPStrategy(static_graph=same, find_unused_parameters=not same, gradient_as_bucket_view=True)


def wait_for_all() -> None:
    """Return when every rank has come here; at once where there is one."""
    if world_size() > 1:
        dist.barrier()


def agree_(model: nn.Module) -> None:
    """Give every rank the parameters and buffers of rank 0, in place.

    Parameters are equal already; batch norm that is not synchronised has followed each rank's own images.
    """
    if world_size() > 1:
        for tensor in model.state_dict().values():
            if not isinstance(tensor, DTensor):  # of which each rank has a share
                dist.broadcast(tensor, src=0)


def first_rank_first(ready: Callable[[], bool], *, what: str) -> None:
    """On all ranks but the first, return when ``ready``: before a fit, ranks meet in the file system alone."""
    if getattr(rank_zero_only, "rank", 0) == 0 or ready():
        return
    log.info("waiting for rank 0: %s", what)
    while not ready():
        time.sleep(POLL_S)
