"""A Lightning strategy for a student that is spread over the ranks: FSDP2 for its weights, DDP for all else.

Weights, their gradients and their moments are divided among the ranks (``qtrain.models.sharding``); these are nearly
all of the memory. Scales, biases, vectors of normalization layers and the objective's own parameters are whole on every
rank, so that code that looks at a quantizer finds the same as on one rank. Resume points are equal to those of an
unsharded run, so either kind of run can continue the other, on any number of ranks.
"""

from collections.abc import Iterable, Mapping
from typing import Any, final

import torch
import torch.distributed as dist
from pytorch_lightning.core.optimizer import LightningOptimizer
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from qtrain.functional.ranks import world_size
from qtrain.models.sharding import shard_, whole_state
from qtrain.quantizers.base import Quantizer
from qtrain.training.optim import load_optimizer_state_, still_accumulating, whole_optimizer_state
from qtrain.training.student import student_of


@torch.no_grad()
def broadcast_(tensors: Iterable[Tensor]) -> None:
    """Give ``tensors`` of every rank the values of rank 0, in place; one message for each dtype and device."""
    alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        alike.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for group in alike.values():
        together = torch.cat([tensor.flatten() for tensor in group])
        dist.broadcast(together, src=0)
        for tensor, part in zip(group, together.split([tensor.numel() for tensor in group]), strict=True):
            tensor.copy_(part.view_as(tensor))


@final
class ShardedStrategy(DDPStrategy):
    """Trains ``module.student`` with divided weights, in the process group of DDP."""

    def model_to_device(self) -> None:
        """Does nothing yet: the whole model might not fit on the device."""

    def configure_ddp(self) -> None:
        assert self.lightning_module is not None
        student = student_of(self.lightning_module)
        own = {p for module in student.modules() if isinstance(module, Quantizer) for p in module.parameters()}
        keep = own | {parameter for parameter in student.parameters() if parameter.ndim <= 1}
        shard_(student, self.root_device, keep=keep)
        self.lightning_module.to(self.root_device)
        for tensor in self.lightning_module.state_dict().values():
            if not isinstance(tensor, DTensor):
                dist.broadcast(tensor, src=0)

    def training_step(self, *arguments: Any, **options: Any) -> Any:
        assert self.lightning_module is not None
        broadcast_(self.lightning_module.buffers())  # as DDP does
        return super().training_step(*arguments, **options)

    @torch.no_grad()
    def post_backward(self, closure_loss: Tensor) -> None:
        """Average the gradients of parameters that every rank has whole, after the last accumulated batch."""
        assert self.lightning_module is not None
        if still_accumulating(self.lightning_module.trainer):
            return
        mine = (p.grad for p in self.lightning_module.parameters() if not isinstance(p, DTensor))
        gradients = [gradient for gradient in mine if gradient is not None]
        if not gradients:
            return
        together = torch.cat([gradient.flatten() for gradient in gradients])  # one message, since they are all small
        dist.all_reduce(together)
        parts = together.div_(world_size()).split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return whole_state(self.lightning_module)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return whole_optimizer_state(optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            load_optimizer_state_(optimizer, state)
