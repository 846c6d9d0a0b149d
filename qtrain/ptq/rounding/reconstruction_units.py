"""The parts of a model that are reconstructed one after the other, and the inputs and outputs of a part."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qtrain.convert.layers import quant_layers
from qtrain.nn import Operand, QuantLayer
from qtrain.utils.calls import by_place
from qtrain.utils.eval_mode import evaluating
from qtrain.utils.suggestions import close_matches


def blocks_of(model: nn.Module, patterns: Sequence[str] = ()) -> list[str]:
    """Names of disjoint parts of ``model`` that together hold all its quantized layers, in the order of its modules.

    ``patterns``, with ``*`` and ``?``, name the blocks; the outermost match counts. Without patterns, a block is a
    child of a ``Sequential`` or ``ModuleList`` that has quantized layers but no such children itself. So a residual
    block is one, but neither its stage nor the convolution in its shortcut. A quantized layer outside of all blocks is
    a part by itself. Raises ``ValueError`` for a pattern that matches no such part.
    """
    names = [name for name, module in model.named_modules() if name and _has_layers(module)]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            close = close_matches(pattern, names)
            raise ValueError(f"blocks: pattern {pattern!r} matches no part with quantized layers{close}")
    found: list[str] = []
    for name in names:
        module = model.get_submodule(name)
        if any(name.startswith(f"{block}.") for block in found):
            continue
        named = any(fnmatchcase(name, pattern) for pattern in patterns)
        repeated = not patterns and _is_block(module) and _repeats(model.get_submodule(name.rpartition(".")[0]))
        if named or repeated or isinstance(module, QuantLayer):
            found.append(name)
    return found


def _has_layers(module: nn.Module) -> bool:
    return any(isinstance(m, QuantLayer) and _quantized(m) for m in module.modules())


def _quantized(layer: QuantLayer) -> bool:
    return layer.weight_quantizer is not None or layer.input_quantizer is not None


def _is_block(module: nn.Module) -> bool:
    """Whether ``module`` has quantized layers, is no list of modules, and contains no block in an inner list."""
    if isinstance(module, QuantLayer) or _repeats(module) or not _has_layers(module):
        return False
    return not any(
        _is_block(part)
        for inner in module.modules()
        if inner is not module and _repeats(inner)
        for part in inner.children()
    )


def _repeats(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential | nn.ModuleList)


def layers_of(model: nn.Module) -> list[str]:
    """Names of the layers of ``model`` with a quantized weight, for reconstruction layer by layer."""
    layers = quant_layers(model).items()
    return [name for name, layer in layers if not isinstance(layer, Operand) and layer.weight_quantizer is not None]


def used_elsewhere(model: nn.Module, part: str) -> dict[nn.Module, str]:
    """The modules inside ``part`` that ``model`` also has outside of it -> their first name there.

    They compute something for other parts too, so that what is best for this one may be bad for those.
    """
    inside = set(model.get_submodule(part).modules()) - {model.get_submodule(part)}
    found: dict[nn.Module, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if module in inside and not name.startswith(f"{part}."):
            found.setdefault(module, name)
    return found


@final
@dataclass(frozen=True, eq=False)
class PartRecord:
    """Inputs (N, ...) and outputs (N, ...) of a part of a model; ``options`` are its other arguments."""

    inputs: Tensor
    outputs: Tensor
    options: tuple[tuple[Any, ...], dict[str, Any]]


class _Enough(Exception):
    """Ends a forward early, when the rest of it is not needed."""


@torch.no_grad()
def record_part(model: nn.Module, name: str, images: Sequence[Tensor]) -> PartRecord:
    """Inputs and outputs of the part ``name``, one of :func:`in_order`, in a forward of ``images`` in eval mode."""
    inputs, outputs, options = [], [], []

    def keep_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        args, kwargs = by_place(module, args, kwargs)
        inputs.append(args[0].clone())  # the part may work in place
        options.append((args[1:], kwargs))

    def keep_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        outputs.append(output)
        raise _Enough

    part = model.get_submodule(name)
    before = part.register_forward_pre_hook(keep_input, with_kwargs=True)
    with before, part.register_forward_hook(keep_output), evaluating(model):
        for batch in images:
            with suppress(_Enough):
                model(batch)
    return PartRecord(torch.cat(inputs), torch.cat(outputs), options[0])


@torch.no_grad()
def in_order(model: nn.Module, names: Sequence[str], image: Tensor) -> tuple[list[str], dict[str, str]]:
    """``names`` in the order in which a forward of ``image`` calls them, and the reasons for those left out.

    A part is left out if a forward does not call it or calls it twice, or if its input or output is not one tensor.
    """
    order: dict[str, None] = {}
    reasons: dict[str, str] = {}

    def look(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        args, kwargs = by_place(model.get_submodule(name), args, kwargs)
        if name in order:
            reasons[name] = "a forward calls it more than once"
        order[name] = None
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        alone = len(tensors) == 1 and args and tensors[0] is args[0] and isinstance(output, Tensor)
        if not alone or len(tensors[0]) != len(image) or len(output) != len(image):
            reasons[name] = "its input and its output are not one tensor each, with a row for each image"

    def hook(name: str) -> Callable[..., None]:
        return lambda _, args, kwargs, output: look(name, args, kwargs, output)

    with ExitStack() as hooks, evaluating(model):
        for name in names:
            hooks.enter_context(model.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True))
        model(image)
    reasons.update({name: "a forward never calls it" for name in names if name not in order})
    return [name for name in order if name not in reasons], reasons
