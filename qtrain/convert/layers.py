"""Finding the layers of a model that can be quantized, with the reason for each that cannot."""

from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from qtrain.convert.bare_weights import watching
from qtrain.convert.replace import unreached
from qtrain.models.ends import IMAGE, Flow
from qtrain.models.layer_kinds import LayerSpec, describe_model
from qtrain.nn import QuantLayer
from qtrain.nn.operations import Operand, Operation
from qtrain.quantizers.base import Quantizer
from qtrain.spec import LayerNames
from qtrain.utils.eval_mode import evaluating

PLACES = ("weight_quantizer", "input_quantizer")
"""Attributes of a converted layer that hold its quantizers."""


@dataclass(frozen=True)
class Quantizable:
    """Layers of a model in the order in which they run, and reasons for those left out; keys are qualified names.

    Among those left out are bare parameters, which are multiplied without being a layer's.

    ``operands`` are the operands of exposed operations: name -> kind of the operation. They are among ``layers`` too.
    ``features`` are further kinds of a layer: depthwise, pointwise, first (it reads the image), last (its output
    becomes the logits with no other weighted layer between).
    """

    layers: dict[str, LayerSpec]
    skipped: dict[str, str]
    operands: dict[str, str]
    features: dict[str, tuple[str, ...]]

    @property
    def weighted(self) -> LayerNames:
        """Names of the layers that have weights, in the order in which they run, with those at the ends."""
        names = [name for name in self.layers if name not in self.operands]
        first, last = ([name for name in names if end in self.features.get(name, ())] for end in ("first", "last"))
        return LayerNames(names, first=first, last=last)

    def kinds(self, name: str) -> tuple[str, ...]:
        """All kinds by which a policy may select the layer ``name``."""
        return (self.operands.get(name, self.layers[name].kind), *self.features.get(name, ()))


def find_layers(model: nn.Module, example: Tensor) -> Quantizable:
    """Every convolution, linear, embedding layer and exposed operand of ``model`` that conversion can replace.

    One forward of ``example`` (N, C, H, W), in eval mode and without gradient, gives their order. It also shows which
    layers are never called, because their owner uses their weight directly. Replacing such a layer would quantize
    nothing, so it is skipped with that reason. A second forward, with all of them replaced, shows which layers are
    called otherwise than by their names; see :mod:`qtrain.convert.replace`. Raises ``ValueError`` for a model that is
    itself a layer, and for one that is compiled.
    """
    compiled = next((n for n, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)), None)
    if compiled is not None or type(model).__name__ == "OptimizedModule":
        what = f"{compiled} of the network is" if compiled else "the network is"
        raise ValueError(f"{what} compiled; quantize the network that was compiled, and compile the student")
    described = describe_model(model)
    if isinstance(described.get(""), LayerSpec):
        raise ValueError(
            f"{type(model).__name__} is itself a layer, and no module holds it in which it could be replaced; wrap it "
            "in torch.nn.Sequential"
        )
    forms = {name: form for name, form in described.items() if isinstance(form, LayerSpec)}
    skipped = {name: reason for name, reason in described.items() if isinstance(reason, str)}
    operands = {
        f"{name}.{child}": operation.kind
        for name, operation in model.named_modules()
        if isinstance(operation, Operation)
        for child, operand in operation.named_modules()
        if isinstance(operand, Operand)
    }
    order, bare, first, last = _call_order(model, example, [*forms, *operands], known=described)
    skipped |= bare
    for name in (*forms, *operands):
        if name not in order:
            skipped[name] = "never called: its owner uses the weight directly, or leaves the layer out in eval mode"
    for parameter in bare:
        owner = parameter.rpartition(".")[0]
        if owner in forms and owner in order:
            skipped[owner] = "its weight is also multiplied without calling it, and there it would not be quantized"
    skipped |= unreached(model, example, {name: forms[name] for name in order if name in forms})
    order = [name for name in order if name not in skipped]
    weighted = [name for name in order if name in forms]
    features = {name: _features(model.get_submodule(name)) for name in weighted}
    for name in weighted:
        features[name] += ("first",) * (name in (first or weighted[:1]))
        features[name] += ("last",) * (name in (last or weighted[-1:]))
    layers = {name: forms.get(name, LayerSpec("operand")) for name in order}
    return Quantizable(layers, skipped, {n: k for n, k in operands.items() if n in order}, features)


def quant_layers(model: nn.Module) -> dict[str, QuantLayer]:
    """The converted layers of ``model`` by qualified name, operands of operations among them."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantLayer)}


def quantizers_of(model: nn.Module) -> dict[str, Quantizer]:
    """The weight and input quantizers of ``model`` by qualified name; those inside a wrapper belong to it."""
    found = {
        f"{name}.{place}": getattr(layer, place) for name, layer in quant_layers(model).items() for place in PLACES
    }
    return {name: quantizer for name, quantizer in found.items() if isinstance(quantizer, Quantizer)}


@contextmanager
def switched_off(quantizers: Iterable[Quantizer | None]) -> Iterator[None]:
    """Inside, ``quantizers`` pass on what they get; afterwards those that were on are on again."""
    on = [quantizer for quantizer in quantizers if quantizer is not None and quantizer.enabled]
    for quantizer in on:
        quantizer.enabled = False
    try:
        yield
    finally:
        for quantizer in on:
            quantizer.enabled = True


def set_quantization(model: nn.Module, *, enabled: bool) -> None:
    """Switch all quantizers of ``model`` on or off; with all off it computes bit for bit what it did unconverted."""
    for quantizer in quantizers_of(model).values():
        quantizer.enabled = enabled


def _features(layer: nn.Module) -> tuple[str, ...]:
    if not isinstance(layer, _ConvNd):
        return ()
    if layer.groups > 1 and layer.groups == layer.in_channels:
        return ("depthwise",)
    return ("pointwise",) if set(layer.kernel_size) == {1} and layer.groups == 1 else ()


class _Calls(NamedTuple):
    """Layers that run, in order; weights that are multiplied outside of layers; those at the ends, of all known ones.

    An end without a layer is one where the values were lost on their way, in code outside of torch for instance.
    """

    order: list[str]
    bare: dict[str, str]
    first: frozenset[str]
    last: frozenset[str]


def _call_order(model: nn.Module, example: Tensor, names: list[str], known: Collection[str]) -> _Calls:
    """Those of ``names`` that run, and what is seen of the layers ``known`` meanwhile."""
    order: dict[str, None] = {}
    flow = Flow()
    flow.mark(example, [IMAGE])
    with ExitStack() as hooks, evaluating(model), torch.no_grad(), watching(model, known) as bare:
        hooks.enter_context(flow.follow(model, [name for name in known if name]))
        for name in names:
            hook = model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: order.setdefault(name))
            hooks.enter_context(hook)
        logits = model(example)
    return _Calls(list(order), bare, frozenset(flow.readers), flow.origins(logits) - {IMAGE})
