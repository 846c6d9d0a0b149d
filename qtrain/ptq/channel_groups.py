"""Which channels of a model's activations may be scaled, and which of them only together.

A layer's output channel may be divided by ``s > 0`` on two conditions (Nagel et al. 2019, arXiv 1906.04721, §4.1). All
layers that read it multiply it by ``s`` again, and all operations between keep the factor, ``f(x / s) = f(x) / s``, as
ReLU, pooling and sums do. A sum ties the channels of its terms to one factor, so a residual stream has one factor for
all its blocks. A depthwise layer has one factor at its input and one at its output. An operation that does not keep a
factor pins it to 1.
"""

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.padding import _ReflectionPadNd, _ReplicationPadNd
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd, _AvgPoolNd, _MaxPoolNd

from qtrain.convert.graph import called, called_once, trace
from qtrain.models.layer_kinds import LayerSpec, describe_layer
from qtrain.models.norms import describe_norm
from qtrain.utils.calls import first_argument
from qtrain.utils.compat import has_hooks
from qtrain.utils.eval_mode import evaluating
from qtrain.utils.sharing import place_of, shared_tensors, why_shared

OUTPUT = "it is the model's output"

_KEEPING: tuple[type[nn.Module], ...] = (
    nn.Identity, nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.ZeroPad2d, _DropoutNd, _ReflectionPadNd, _ReplicationPadNd,
    _AvgPoolNd, _MaxPoolNd, _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd,
)  # fmt: skip
_KEEPING_CALLS = {
    F.relu, torch.relu, F.relu_, torch.relu_, F.leaky_relu, F.dropout, F.avg_pool2d, F.max_pool2d,
    F.adaptive_avg_pool2d, F.adaptive_max_pool2d, "relu", "relu_", "contiguous", "clone", "detach", "neg", operator.neg,
}  # fmt: skip
_SUMS = {operator.add, operator.iadd, operator.sub, operator.isub, torch.add, torch.sub, "add", "add_", "sub", "sub_"}
_PRODUCTS = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
_QUOTIENTS = {operator.truediv, torch.div, "div"}
_SHAPES = {getattr, "size", "dim"}


@dataclass
class ScaledLayer:
    """A convolution or linear layer, with the number of the factor of each input (I,) and output channel (O,)."""

    module: nn.Module
    inputs: Tensor
    outputs: Tensor


@dataclass
class ChannelGroups:
    """Factors 0..count-1, the layers that they scale by qualified name, and why some are pinned.

    ``refused`` are layers whose weight or bias is also used elsewhere, with the reason.
    """

    count: int
    layers: dict[str, ScaledLayer]
    pinned: dict[int, str]
    refused: dict[str, str]


def find_channel_groups(model: nn.Module, example: Tensor) -> ChannelGroups:
    """The factors of ``model``, a float model; ``example`` (N, C, H, W) gives the shapes."""
    graph = trace(model)
    with torch.no_grad(), evaluating(model):
        _Shapes(graph).run(example)
    walk = _Walk(graph, shared_tensors(model))
    for node in graph.graph.nodes:
        walk.visit(node)
    return walk.scales()


class _Shapes(fx.Interpreter):
    """Notes the shape of each node's tensor."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            n.meta["shape"] = tuple(result.shape)
        return result


@dataclass
class _Walk:
    """Gives each channel of each node a factor; ``parent`` is a union-find forest of tied factors."""

    graph: fx.GraphModule
    shared: dict[str, tuple[str, ...]]
    parent: list[int] = field(default_factory=list)
    pins: list[tuple[int, str]] = field(default_factory=list)
    channels: dict[fx.Node, list[int]] = field(default_factory=dict)
    layers: dict[str, tuple[nn.Module, list[int], list[int]]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def visit(self, node: fx.Node) -> None:
        """Find the factors of the channels of ``node`` from those of its inputs."""
        if node.op == "output":
            self.pin(node.all_input_nodes, OUTPUT)
        elif node.op == "placeholder":
            self.begin(node, "it is the model's input")
        elif node.op != "get_attr":
            kept = self.layer(node) or self.kept(node)
            if kept is not None:
                self.channels[node] = kept
            elif node.target not in _SHAPES:
                reason = f"it goes to {self.title(node)}, which keeps no scale"
                self.pin(node.all_input_nodes, reason)
                self.begin(node, f"it is of {self.title(node)}")

    def layer(self, node: fx.Node) -> list[int] | None:
        """A new factor for each output channel of a layer; ``None`` if it is not a layer that can be scaled."""
        module, x = called(self.graph, node), first_argument(node.args, node.kwargs)
        if not isinstance(module, _ConvNd | nn.Linear) or isinstance(module, _ConvTransposeNd):
            return None
        form, ids = describe_layer(module), self.channels.get(x) if isinstance(x, fx.Node) else None
        plain = isinstance(form, LayerSpec) and form.weight_transform is None and called_once(self.graph, node)
        reason = self.used_elsewhere(str(node.target))
        if reason is not None:
            self.refused[str(node.target)] = reason
            return None
        outputs = module.out_features if isinstance(module, nn.Linear) else module.out_channels
        inputs = module.in_features if isinstance(module, nn.Linear) else module.in_channels
        tokens = isinstance(module, nn.Linear) and len(node.meta.get("shape", ())) != 2
        if has_hooks(module) or not plain or tokens or ids is None or len(ids) != inputs:
            return None
        made = self.new(outputs)
        self.layers[str(node.target)] = module, ids, made
        return made

    def used_elsewhere(self, layer: str) -> str | None:
        """Why the weight and the bias of ``layer`` are not its own alone."""
        read = {place_of(_attribute(self.graph, n)) for n in self.graph.graph.nodes if n.op == "get_attr"}
        for part in ("weight", "bias"):
            tensor = getattr(self.graph.get_submodule(layer), part)
            if tensor is not None and place_of(tensor) in read:
                return f"its {part} is also used outside of the layer"
        return why_shared(self.shared, layer, "weight", "bias")

    def kept(self, node: fx.Node) -> list[int] | None:
        """The factors of an operation that keeps them; ``None`` for other operations."""
        module, target = called(self.graph, node), node.target
        first = first_argument(node.args, node.kwargs)
        x = self.channels.get(first) if isinstance(first, fx.Node) else None
        values = [*node.args, *node.kwargs.values()]
        operands = [self.channels.get(a) for a in values if isinstance(a, fx.Node) and a.op != "get_attr"]
        if module is not None and has_hooks(module):
            return None  # a hook may do anything
        if isinstance(module, _KEEPING) or target in _KEEPING_CALLS:
            return self.same(node, x)
        if isinstance(module, nn.Flatten) or target in ("flatten", torch.flatten):
            return self.flattened(node, first, x)
        if target in _SUMS:
            return self.tied(operands)
        if target in _PRODUCTS:
            return self.product(node, operands)
        if target in _QUOTIENTS:
            return self.same(node, x) if len(operands) == 1 else None
        if target in ("mean", torch.mean):
            return self.averaged(node, first, x)
        if target in (torch.cat, torch.concat):
            return self.joined(node)
        if target is F.pad:
            return self.padded(node, x)
        return self.indexed(node, x) if target is operator.getitem else None

    def same(self, node: fx.Node, x: list[int] | None) -> list[int] | None:
        shape = node.meta.get("shape")  # of a pair of outputs there is none
        return x if x is not None and shape is not None and shape[1] == len(x) else None

    def flattened(self, node: fx.Node, source: Any, x: list[int] | None) -> list[int] | None:
        """(N, C, H, W) to (N, C H W): each channel's factor for all its positions."""
        shape = node.meta["shape"]
        if x is None or len(shape) != 2 or shape[0] != source.meta["shape"][0]:
            return None
        return [one for one in x for _ in range(shape[1] // len(x))]

    def tied(self, operands: list[list[int] | None]) -> list[int] | None:
        """A sum of two activations: in each channel both terms have one factor, which also holds for their inputs."""
        if len(operands) != 2 or operands[0] is None or operands[1] is None or len(operands[0]) != len(operands[1]):
            return None
        for left, right in zip(*operands, strict=True):
            self.parent[self.find(left)] = self.find(right)
        return operands[0]

    def product(self, node: fx.Node, operands: list[list[int] | None]) -> list[int] | None:
        """A product with a number or a parameter keeps factors; so does one with a gate whose factors are pinned."""
        if len(operands) == 1:
            return self.same(node, operands[0])
        pinned = {self.find(one) for one, _ in self.pins}
        for gate, kept in (operands, operands[::-1]) if len(operands) == 2 else ():
            if gate is not None and all(self.find(one) in pinned for one in gate):
                return self.same(node, kept)
        return None

    def averaged(self, node: fx.Node, source: Any, x: list[int] | None) -> list[int] | None:
        """A mean over positions."""
        given: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        axes = (given,) if isinstance(given, int) else given
        if x is None or not axes or not all(isinstance(axis, int) for axis in axes):
            return None
        if any(axis % len(source.meta["shape"]) < 2 for axis in axes):
            return None
        return self.same(node, x)

    def joined(self, node: fx.Node) -> list[int] | None:
        tensors: Any = node.args[0] if node.args else node.kwargs.get("tensors")
        if not isinstance(tensors, tuple | list):
            return None
        parts = [self.channels.get(a) for a in tensors]
        axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        if axis != 1 or any(part is None for part in parts):
            return None
        return [one for part in parts if part is not None for one in part]

    def padded(self, node: fx.Node, x: list[int] | None) -> list[int] | None:
        """Padding with zeros around a map or with zero channels; zeros have any factor."""
        amounts: Any = node.args[1] if len(node.args) > 1 else None
        value = node.args[3] if len(node.args) > 3 else node.kwargs.get("value")
        if x is None or value not in (None, 0, 0.0) or not isinstance(amounts, tuple | list):
            return None
        axis = 2 * (len(node.meta["shape"]) - 2)  # where the channels' amounts are: the last axis comes first
        before, after = amounts[axis : axis + 2] if len(amounts) > axis else (0, 0)
        if not (isinstance(before, int) and isinstance(after, int)):  # computed meanwhile
            return None
        return self.new(before) + x + self.new(after) if min(before, after) >= 0 else None

    def indexed(self, node: fx.Node, x: list[int] | None) -> list[int] | None:
        """Some positions, or some channels, of a map, taken by slices."""
        index: Any = node.args[1]
        if x is None or not isinstance(index, tuple) or not all(isinstance(part, slice) for part in index):
            return None
        samples, channels = (*index, slice(None), slice(None))[:2]
        bounds = (channels.start, channels.stop, channels.step)
        known = all(bound is None or isinstance(bound, int) for bound in bounds)  # others are computed meanwhile
        return x[channels] if samples == slice(None) and known else None

    def new(self, number: int) -> list[int]:
        first = len(self.parent)
        self.parent.extend(range(first, first + number))
        return list(range(first, first + number))

    def begin(self, node: fx.Node, reason: str) -> None:
        """New factors, all pinned, for a node that has no factors from its inputs."""
        shape = node.meta.get("shape", ())
        if len(shape) > 1:
            self.channels[node] = self.new(shape[1])
            self.pin([node], reason)

    def pin(self, nodes: list[fx.Node], reason: str) -> None:
        self.pins += [(one, reason) for node in nodes for one in self.channels.get(node, ())]

    def find(self, one: int) -> int:
        while self.parent[one] != one:
            self.parent[one] = self.parent[self.parent[one]]
            one = self.parent[one]
        return one

    def title(self, node: fx.Node) -> str:
        module = called(self.graph, node)
        if module is None:
            return str(getattr(node.target, "__name__", node.target))
        return "a batch norm that is not folded" if describe_norm(module) is not None else type(module).__name__

    def scales(self) -> ChannelGroups:
        numbers: dict[int, int] = {}
        layers = {}
        for name, (module, inputs, outputs) in self.layers.items():
            ids = [[numbers.setdefault(self.find(one), len(numbers)) for one in part] for part in (inputs, outputs)]
            layers[name] = ScaledLayer(module, torch.tensor(ids[0]), torch.tensor(ids[1]))
        pinned: dict[int, str] = {}
        for one, reason in self.pins:
            if self.find(one) in numbers:
                pinned.setdefault(numbers[self.find(one)], reason)
        return ChannelGroups(len(numbers), layers, pinned, self.refused)


def _attribute(graph: fx.GraphModule, node: fx.Node) -> Tensor:
    """The tensor that ``node`` gets from a module."""
    owner, _, leaf = str(node.target).rpartition(".")
    found = getattr(graph.get_submodule(owner), leaf)
    return found if isinstance(found, Tensor) else torch.empty(0)
