"""A model whose parameters are spread over the ranks, each block gathered only while it runs.

A sharded parameter is a ``DTensor``. Optimizers treat it like any other parameter, and its moments are sharded too.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

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


def shard_(model: nn.Module, device: torch.device | str, *, keep: Collection[nn.Parameter] = ()) -> None:
    """Give each rank of the process group its share of each parameter but those of ``keep``, in place, on ``device``.

    FSDP2 (``fully_shard``): a block's parameters are gathered for its forward and its backward and let go after them. A
    device can thus run a model that it could not hold whole: it holds its share, the largest block, and what is in no
    block. Blocks move to the device one after the other, with the values of rank 0. Buffers and the parameters of
    ``keep`` stay whole; 0-dim parameters must be in ``keep``.
    """
    mesh = init_device_mesh(torch.device(device).type, (world_size(),))
    kept = set(keep)
    for part in [*blocks(model), model]:
        for parameter in part.parameters():
            if parameter not in kept and not isinstance(parameter, DTensor):
                parameter.data = parameter.data.to(device)
                dist.broadcast(parameter.data, src=0)
        fully_shard(part, mesh=mesh, ignored_params=kept)


def is_sharded(model: nn.Module) -> bool:
    """Whether ranks have shares of ``model``."""
    return isinstance(model, FSDPModule)


@contextmanager
def whole_weights(model: nn.Module, *, write: bool = False) -> Iterator[None]:
    """Inside, each rank has all of ``model``, if it was sharded; a forward inside does not shard it again.

    For code that reads weights outside of a forward. With ``write``, changes of the weights inside are kept; all ranks
    must make the same changes.
    """
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    shared = {name: own for name, own in model.named_parameters() if isinstance(own, DTensor)}
    changed: dict[str, Tensor] = {}
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
        if write:
            for name, parameter in model.named_parameters():
                if name in shared:  # the gathered tensor disappears at the end of the block
                    changed[name] = shared_as(parameter.detach(), shared[name]).clone()
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part is not model, recurse=False)  # the root's would be next again
    with torch.no_grad():
        for name, share in changed.items():
            shared[name].copy_(share)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded ``tensor``, on the CPU; all ranks must call this. Any other tensor is returned as it
    is."""
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def shared_as(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's share of ``tensor``, which all ranks have whole, if ``like`` is sharded; otherwise ``tensor``."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of ``model`` with whole tensors; all ranks must call this."""
    return {name: whole(tensor.detach()) for name, tensor in model.state_dict().items()}
