"""Floor 2, models: a model whose parameters are spread over the ranks, each block gathered only while it runs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from qtrain.functional.ranks import world_size


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that are gathered one at a time: what ``model`` has in sequences and lists, however deep these nest.

    For timm's models and the CIFAR ResNets these are the residual or transformer blocks.
    """
    for child in model.children():
        if isinstance(child, nn.Sequential | nn.ModuleList):
            for part in child:
                if isinstance(part, nn.Sequential | nn.ModuleList):
                    yield from blocks(nn.ModuleList([part]))
                elif any(True for _ in part.parameters()):
                    yield part
        else:
            yield from blocks(child)


def shard_(model: nn.Module, device: torch.device | str) -> None:
    """Give each rank of the process group its share of each parameter, in place, on ``device``.

    FSDP2 (``fully_shard``): a block's parameters are gathered for its forward and let go after it. So a model lies on a
    device that could not hold it whole; beside its share there is the largest block, and what is in no block. Blocks
    move one after the other. Buffers stay whole. ``model`` must have no 0-dim parameters.
    """
    mesh = init_device_mesh(torch.device(device).type, (world_size(),))
    for block in blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
