"""Results over a whole batch of which each rank holds one slice: they equal those of one process.

Slices are equal in size and lie in the order of the ranks. On one rank each function gives what it is given.
They can be part of a compiled graph, since the number of ranks never changes while a process lives.
"""

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor

# Newer versions of torch have the same function under this name.
_gather = getattr(collectives, "all_gather_single_autograd", None) or collectives.all_gather_tensor_autograd


def world_size() -> int:
    """How many ranks share each batch; 1 outside of a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process's slice, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def gathered(x: Tensor) -> Tensor:
    """``x`` of every rank: (R, *x.shape). Gradients go back to the rank that each part came from."""
    if world_size() == 1:
        return x[None]
    result: Tensor = _gather(x[None].contiguous(), 0, _all())
    return result


def whole_batch(x: Tensor) -> Tensor:
    """The rows (R N, ...) of all ranks, in their order, for this rank's ``x`` (N, ...).

    For a loss that compares samples with each other. Every rank then computes it whole, and the mean of the ranks'
    gradients is its gradient.
    """
    return gathered(x).flatten(0, 1)


@torch.no_grad()
def largest_of_ranks(x: Tensor) -> Tensor:
    """Element-wise maximum of ``x`` over the ranks; no gradient."""
    return _reduced(x, "max")


@torch.no_grad()
def mean_of_ranks(x: Tensor) -> Tensor:
    """Element-wise mean of ``x`` over the ranks; no gradient."""
    return _reduced(x, "sum") / world_size()


def place_in_batch(x: Tensor) -> int:
    """How many elements of the whole batch come before this rank's slice ``x`` (N, ...)."""
    return rank() * x.numel()


def _all() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def _reduced(x: Tensor, how: str) -> Tensor:
    if world_size() == 1:
        return x
    result: Tensor = collectives.all_reduce(x.contiguous(), how, _all())
    return result
