"""Products with a weight that is no layer: a bare parameter in a matrix product, an einsum, a functional convolution.

Conversion replaces layers, so such a weight stays in full precision. It has to be said, since nothing in the list of a
model's modules shows it. The operations of one forward do: each is seen with its tensors as it runs.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

PRODUCTS: dict[Callable[..., Any], str] = {
    torch.matmul: "matmul", torch.Tensor.matmul: "matmul", torch.Tensor.__matmul__: "matmul",
    torch.Tensor.__rmatmul__: "matmul", torch.mm: "matmul", torch.Tensor.mm: "matmul", torch.bmm: "matmul",
    torch.Tensor.bmm: "matmul", torch.addmm: "addmm", torch.Tensor.addmm: "addmm", torch.baddbmm: "baddbmm",
    torch.einsum: "einsum", torch.tensordot: "tensordot", F.linear: "linear", F.bilinear: "bilinear",
    F.conv1d: "conv1d", F.conv2d: "conv2d", F.conv3d: "conv3d", F.embedding: "embedding",
    F.conv_transpose1d: "conv_transpose1d", F.conv_transpose2d: "conv_transpose2d",
    F.conv_transpose3d: "conv_transpose3d",
}  # fmt: skip
"""Functions of torch that multiply by a matrix or a kernel, and what they are called."""

UNREGISTERED = "unregistered parameter"
"""What a parameter is called that no module of the model holds."""


class _Watch(TorchFunctionMode):
    """Notes the products of weights that run outside of known layers, by the module that runs them."""

    def __init__(self, parameters: dict[int, str], inside: list[str], known: Collection[str]) -> None:
        super().__init__()
        self.found: dict[str, str] = {}
        self._weights: dict[int, tuple[Tensor, str]] = {}  # the tensor too, so that no other one gets its id
        self._parameters, self._inside, self._known = parameters, inside, known

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = list(_tensors((args, kwargs or {})))
        names = [name for tensor in tensors if (name := self._weight(tensor)) is not None]
        if names and len(names) == len(tensors) and isinstance(result, Tensor):
            self._weights[id(result)] = (result, names[0])  # a weight that was transposed, reshaped, scaled, ...
        elif names and func in PRODUCTS and not any(name in self._known for name in self._inside):
            matrix = next((n for t in tensors if (n := self._weight(t)) is not None and t.ndim > 1), None)
            if matrix is not None:
                owner = f" in {self._inside[-1]}" if self._inside and self._inside[-1] else ""
                self.found[matrix] = f"a bare parameter, multiplied by {PRODUCTS[func]}{owner}"
                if matrix.startswith(UNREGISTERED):
                    self.found[matrix] = (
                        f"multiplied by {PRODUCTS[func]}{owner} and held by no module (by a Python list?), so that it "
                        "is not saved either; hold its layer in a torch.nn.ModuleList"
                    )
        return result

    def _weight(self, tensor: Tensor) -> str | None:
        derived = self._weights.get(id(tensor))
        if derived is not None:
            return derived[1]
        name = self._parameters.get(id(tensor))
        if name is None and isinstance(tensor, nn.Parameter):
            return f"{UNREGISTERED} {tuple(tensor.shape)}"
        return name


@contextmanager
def watching(model: nn.Module, known: Collection[str]) -> Iterator[dict[str, str]]:
    """Inside, what is yielded gets each parameter of ``model`` that a product reads outside of the layers ``known``.

    These are qualified names -> what is done with the parameter; one that no module holds is named by its shape.
    ``known`` are the layers that conversion replaces or refuses by name.
    """
    parameters = {id(parameter): name for name, parameter in model.named_parameters()}
    inside: list[str] = []
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: inside.append(name)))
        handles.append(module.register_forward_hook(lambda *_: inside.__delitem__(-1), always_call=True))
    watch = _Watch(parameters, inside, known)
    try:
        with watch:
            yield watch.found
    finally:
        for handle in handles:
            handle.remove()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
