"""Several processes (ranks) that train one model: Lightning's strategy, waiting, and equal weights at the end.

Each rank takes its slice of every batch. Gradients are averaged, so that the step is that of the whole batch.
"""

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
    """Whether Lightning's trainer may have several processes; with ``auto`` or -1 devices that is not known."""
    return nodes != 1 or devices not in (1, "1")


def strategy_for(asked: Any, *, devices: Any, nodes: int, accumulated: int = 1, shard: bool = False) -> Any:
    """The strategy for Lightning's trainer: DDP for several processes, unless ``asked`` names something else.

    With ``shard`` it is FSDP2.

    The graph of a step is always the same. DDP is told so, and finds out only once which parameters the objective does
    not reach (those after a hint, for instance), so that it does not wait for their gradients. If gradients of several
    batches are ``accumulated``, this is not possible, since not every backward communicates; DDP then looks for these
    parameters at each step.
    """
    if asked not in ("auto", "ddp") or not several(devices=devices, nodes=nodes):
        return asked
    if shard:
        return ShardedStrategy()
    same = accumulated == 1
    return DDPStrategy(static_graph=same, find_unused_parameters=not same, gradient_as_bucket_view=True)


def wait_for_all() -> None:
    """Return when every rank has called this; with one rank, at once."""
    if world_size() > 1:
        dist.barrier()


def agree_(model: nn.Module) -> None:
    """Give every rank the parameters and buffers of rank 0, in place.

    Parameters are equal already, but batch norm that is not synchronized has statistics of each rank's own images.
    """
    if world_size() > 1:
        for tensor in model.state_dict().values():
            if not isinstance(tensor, DTensor):  # each rank has a share of it
                dist.broadcast(tensor, src=0)


def first_rank_first(ready: Callable[[], bool], *, what: str) -> None:
    """On all ranks but the first, wait for ``ready``: before a fit, ranks communicate only by files."""
    if getattr(rank_zero_only, "rank", 0) == 0 or ready():
        return
    log.info("waiting for rank 0: %s", what)
    while not ready():
        time.sleep(POLL_S)
