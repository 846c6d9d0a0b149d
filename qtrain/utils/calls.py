"""What a layer was called with, by its place or by its name."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle

NAMES = ("input", "x")
"""How layers of torch and timm call what they are given."""


def first_argument(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What a layer was called with, by its place or by its name; ``None`` for a call without arguments.

    ``layer(x)``, ``layer(input=x)`` and ``layer(output_size=size, input=x)`` all give ``x``.
    """
    if args:
        return args[0]
    return next((kwargs[name] for name in (*NAMES, *kwargs) if name in kwargs), None)


def by_place(module: "nn.Module", args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The call ``module(*args, **kwargs)`` with its first argument by place, if it was given by name."""
    name = next(iter(inspect.signature(module.forward).parameters), None)
    if args or name not in kwargs:
        return args, kwargs
    return (kwargs[name],), {key: value for key, value in kwargs.items() if key != name}


def see_input(layer: "nn.Module", see: "Callable[[Tensor], object]") -> "RemovableHandle":
    """A hook that calls ``see`` with the input of each call of ``layer``, before the call."""

    def hook(module: "nn.Module", args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see(first_argument(args, kwargs))

    return layer.register_forward_pre_hook(hook, with_kwargs=True)
