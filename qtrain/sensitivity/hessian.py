"""The Hessian of the loss by weights and by inputs of layers, as products with vectors: the matrix is never formed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, final

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from qtrain.convert.bank import QuantizerBank
from qtrain.functional.losses import hard_loss
from qtrain.functional.random import keyed_uniform
from qtrain.nn import Operand
from qtrain.sensitivity.base import Given, chunks, members
from qtrain.spec import Batch, Choice, Role
from qtrain.utils.calls import see_input


class Variable(NamedTuple):
    """A tensor by which the loss is differentiated: the weight of ``layer``, or zeros added to what one call reads."""

    layer: str
    value: Tensor


@final
class Curvature:
    """The mean loss of some images around a model in full precision: its gradient, and products with its Hessian.

    ``variables`` are those of one role, of tied layers once; the gradient is by all of them. The loss is the
    cross-entropy with the labels. Made inside of :func:`qtrain.sensitivity.base.scoring`.
    """

    def __init__(self, bank: QuantizerBank, role: Role, batch: Batch) -> None:
        with _differentiable(bank, role) as found, sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            # Only this form of attention has a second derivative.
            loss = hard_loss(bank.model(batch.image), batch.target)
            self.variables: list[Variable] = list(found)
            self._values = [variable.value for variable in self.variables]
            self.gradients = torch.autograd.grad(loss, self._values, create_graph=True, materialize_grads=True)

    def products(self, vectors: Sequence[Tensor], only: int | None = None) -> list[Tensor]:
        """``H v``, of the variables' shapes; of ``only`` one variable, the product with its own block of ``H``."""
        places = range(len(self._values)) if only is None else [only]
        at = [place for place in places if self.gradients[place].requires_grad]
        if not at:
            return [torch.zeros_like(self._values[place]) for place in places]
        return list(
            torch.autograd.grad(
                [self.gradients[place] for place in at],
                [self._values[place] for place in places],
                [vectors[place] for place in at],
                retain_graph=True,
                materialize_grads=True,
            )
        )


def random_signs(key: int, like: Tensor) -> Tensor:
    """Numbers 1 and -1, a function of ``key`` and the element's place; of the shape of ``like``."""
    draw = keyed_uniform(torch.tensor(key, device=like.device), tuple(like.shape))
    return torch.where(draw < 0.5, -1.0, 1.0).to(like)


@torch.no_grad()
def noise_power(bank: QuantizerBank, batches: Sequence[Batch], chunk: int) -> dict[Choice, float]:
    """The mean of ``(Q(t) - t)^2`` over the elements of a weight, or of an input on all images, for each choice."""
    sums: dict[Choice, float] = {}
    elements: dict[Choice, int] = {}

    def add(name: str, x: Tensor, role: Role) -> None:
        for choice in of[name]:
            if choice.role == role:
                quantizer = bank.quantizers[name][role][choice.bits].eval()
                sums[choice] = sums.get(choice, 0.0) + float((quantizer(x) - x).square().sum(dtype=torch.float64))
                elements[choice] = elements.get(choice, 0) + x.numel()

    of = {name: [c for c in bank.choices() if name in members(bank, c)] for name in bank.layers}
    for name, layer in bank.layers.items():
        if not isinstance(layer, Operand):
            add(name, layer.effective_weight(), "weight")
    seen: list[Callable[[Tensor], None]] = [lambda x, name=name: add(name, x, "input") for name in bank.layers]  # type: ignore[misc]
    hooks = [see_input(layer, see) for layer, see in zip(bank.layers.values(), seen, strict=True)]
    try:
        for _, batch in chunks(batches, chunk):
            bank.model(batch.image)
    finally:
        for hook in hooks:
            hook.remove()
    return {choice: total / elements[choice] for choice, total in sums.items()}


class _Shift(nn.Module):
    """Adds zeros to differentiate by; each call has its own."""

    enabled = True

    def __init__(self, layer: str, found: list[Variable]) -> None:
        super().__init__()
        self.layer, self.found = layer, found

    def forward(self, x: Tensor) -> Tensor:
        zeros = torch.zeros_like(x, requires_grad=True)
        self.found.append(Variable(self.layer, zeros))
        return x + zeros


@contextmanager
def _differentiable(bank: QuantizerBank, role: Role) -> Iterator[list[Variable]]:
    """Inside, a forward collects the variables of ``role``; weights are there at once, inputs as they are read."""
    found: list[Variable] = []
    owners = {name: names[0] for names in bank.tied[role].values() for name in names}
    leaves: dict[str, Tensor] = {}
    try:
        for name, layer in bank.layers.items():
            if role not in bank.quantizers[name]:
                continue
            owner = owners.get(name, name)
            stand_in: nn.Module = _Shift(owner, found)
            if role == "weight" and not isinstance(layer, Operand):
                if owner not in leaves:
                    leaves[owner] = layer.effective_weight().detach().clone().requires_grad_()
                    found.append(Variable(owner, leaves[owner]))
                stand_in = Given(leaves[owner])
            setattr(layer, f"{role}_quantizer", stand_in)
        yield found
    finally:
        for name, layer in bank.layers.items():
            if role in bank.quantizers[name]:
                setattr(layer, f"{role}_quantizer", None)
