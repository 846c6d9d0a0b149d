"""What a student computes beside its layers, step by step: what each reads, and who reads what it gives.

A runtime computes a step with integers only where it finds codes: what it reads was quantized, and, for some runtimes,
what it gives is quantized before anything else reads it. Both are seen on the student's graph.
"""

import copy
import operator
from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx, nn

from qtrain.convert.graph import called, trace
from qtrain.convert.operation_nodes import MODULES, is_number, name_of, named_kind
from qtrain.convert.replace import replace_module
from qtrain.deployment.onnx.forms import NoFormError, input_codes
from qtrain.deployment.onnx.lowering import norms_of, rest_in_place
from qtrain.models.norms import is_norm
from qtrain.nn import Operand, QuantLayer, QuantWeighted
from qtrain.nn.operations import Applied, Operation
from qtrain.utils.calls import first_argument

SEEN_THROUGH = {
    "reshape", "view", "flatten", "unflatten", "permute", "transpose", "squeeze", "unsqueeze", "swapaxes", "movedim",
    "contiguous", "clone", "flip", "max_pool2d", "slice", "maxpool2d", "view_as", "reshape_as",
}  # fmt: skip
"""Moves of values behind which a runtime sees the quantizer."""

MOVES = SEEN_THROUGH | {
    "expand", "expand_as", "repeat", "roll", "getitem", "select", "narrow", "chunk", "split", "unbind", "pad",
    "interpolate", "upsample", "pixel_shuffle", "pixelshuffle", "pixel_unshuffle", "pixelunshuffle", "channel_shuffle",
    "channelshuffle", "zeropad2d", "constantpad2d", "adaptive_max_pool2d", "adaptivemaxpool2d", "hardsigmoid",
}  # fmt: skip
"""Functions whose output has only values of their input. Of a hard sigmoid these are its codes, with another scale."""

COMPUTED = {"max_pool2d", "maxpool2d", "interpolate", "upsample", "adaptive_max_pool2d", "adaptivemaxpool2d"}
"""Moves that are a step by themselves where they read no codes."""

MERGED = {"relu", "relu6", "hardtanh", "clamp", "clip"}
"""Bounds, which a runtime merges into the layer before them or into the codes behind them."""

BOUND, MOVE = "bound", "move"
"""The kinds of steps that are a bound which is not merged, and a move of values that are no codes."""

NOTHING = {"dropout", "dropout1d", "dropout2d", "dropout3d", "identity", "float", "to", "detach", "type_as", "_assert"}
"""What computes nothing at inference."""


@dataclass(frozen=True)
class Step:
    """One computation of a student: a layer, an operation, a function in a forward.

    ``name`` is the module that it is or stands in, empty for the network itself, ``title`` what it is called there,
    ``kind`` that of :data:`qtrain.convert.operation_nodes.KINDS`, or one of :data:`BOUND` and :data:`MOVE`.
    ``reads_codes``: all that it works on is quantized.
    ``read_by`` names a reader that does not quantize what it gives as the others do, ``None`` where there is none.
    ``module`` is the norm, or any other module that is this step.
    """

    name: str
    title: str
    kind: str | None
    reads_codes: bool
    read_by: str | None = None
    module: nn.Module | None = None


@dataclass(frozen=True)
class Steps:
    """The ``steps`` of a student that are known; of ``unknown`` modules, by their names, the graph is not."""

    steps: list[Step]
    unknown: dict[str, str]


def steps_of(student: nn.Module) -> Steps:
    """The steps of ``student``, calibrated, in the order in which they run.

    Norms that a layer takes in are none. Where the student or a module of it cannot be traced, its operations and norms
    are steps of which it is not known who reads them.
    """
    model = copy.deepcopy(student)
    for _, (norm, form) in norms_of(model, quiet=True):
        old = model.get_submodule(norm)
        replace_module(model, old, rest_in_place(old, form))
    try:
        graph = trace(model, norms=False)
    except ValueError as error:
        return Steps(list(_modules(model, "")), {"": str(error)})
    return _Reading(model, graph).steps()


class _Reading:
    """A student, its graph, which has the modules that are called alone, and what was found of its nodes."""

    def __init__(self, model: nn.Module, graph: fx.GraphModule) -> None:
        self._model, self._graph = model, graph
        self._codes: dict[fx.Node, bool] = {}
        self._live: set[fx.Node] = set()  # what follows from the images
        for node in graph.graph.nodes:
            if node.op == "placeholder" or (self._inputs(node) and not is_number(node) and node.op != "output"):
                self._live.add(node)

    def steps(self) -> Steps:
        found, unknown = [], {}
        for node in self._graph.graph.nodes:
            if node not in self._live or node.op == "placeholder":
                continue
            reads = self._reads_codes(node)
            module, title = called(self._graph, node), self._title(node)
            self._codes[node] = reads and (isinstance(module, Operand) or title in MOVES | NOTHING)
            if module is not None and _opaque(module):
                unknown[str(node.target)] = "it cannot be traced"
                found += list(_modules(module, str(node.target)))
            elif self._is_step(node, title, reads):
                found.append(self._step(node, title, reads))
        return Steps(found, unknown)

    def _inputs(self, node: fx.Node) -> list[fx.Node]:
        return [one for one in node.all_input_nodes if one in self._live]

    def _reads_codes(self, node: fx.Node) -> bool:
        module, inputs = called(self._graph, node), self._inputs(node)
        if isinstance(module, QuantLayer):
            return _quantizes(module) or self._codes.get(inputs[0], False)
        constants = [one for one in node.all_input_nodes if one not in self._live and one.op == "get_attr"]
        return not constants and all(self._codes.get(one, False) for one in inputs)

    def _is_step(self, node: fx.Node, title: str, reads: bool) -> bool:
        if isinstance(called(self._graph, node), Operand) or title in NOTHING:
            return False
        if title in MERGED:
            source = first_argument(node.args, node.kwargs)
            merged = isinstance(source, fx.Node) and _convolves(called(self._graph, source))
            return not merged and self._read_by(node) is not None
        return not (title in MOVES and (reads or title not in COMPUTED)) or title == "hardsigmoid"

    def _step(self, node: fx.Node, title: str, reads: bool) -> Step:
        module, name, merged = called(self._graph, node), self._place(node), title in MERGED
        kind = (MODULES.get(type(module)) or ("norm" if is_norm(module) else None)) if module else named_kind(node)
        if module is not None and not isinstance(module, QuantWeighted):
            title = type(module).__name__
        owner = self._model.get_submodule(name) if name else None
        if isinstance(owner, Applied):
            title, kind = owner.function_name, owner.kind
        elif owner is not None and is_norm(owner):
            title, kind, module = type(owner).__name__, "norm", owner
        elif merged:
            kind = BOUND
        elif kind is None and self._title(node) in COMPUTED:
            kind = MOVE
        own = isinstance(owner, Operation | QuantWeighted)  # a number or parameter beside codes has none
        return Step(name, title, kind, reads and own, self._read_by(node), module)

    def _read_by(self, node: fx.Node) -> str | None:
        found = self._readers(node)
        others = [name for name, key in found.items() if key is None]
        return others[0] if others else _OTHER_SCALES if len(set(found.values())) > 1 else None

    def _readers(self, node: fx.Node) -> dict[str, object]:
        """Who reads what ``node`` gives -> by which codes, ``None`` where it does not quantize it at once."""
        found: dict[str, object] = {}
        readers = [one for one in node.users if one in self._live or one.op == "output"]
        for reader in readers:
            module, title = called(self._graph, reader), self._title(reader)
            if reader.op == "output":
                found["the network's output"] = None
            elif isinstance(module, QuantLayer) and (key := _key(module)) is not None:
                found[self._place(reader)] = key
            elif (
                title in MERGED | NOTHING
                or (isinstance(module, Operand) and not _quantizes(module))
                or (len(readers) == 1 and title in SEEN_THROUGH)
            ):
                found |= self._readers(reader)
            else:
                found[" of ".join(filter(None, (title, self._place(reader))))] = None
        return found

    def _title(self, node: fx.Node) -> str:
        """The name of the function or method that ``node`` calls, or of its module's class, in small letters."""
        module = called(self._graph, node)
        mode = str(module.mode if isinstance(module, nn.Upsample) else node.kwargs.get("mode", "nearest"))
        name = name_of(node) if module is None else type(module).__name__.lower()
        if name in ("interpolate", "upsample") and not mode.startswith("nearest"):
            return f"{mode} interpolation"
        if node.op == "call_function" and node.target is operator.getitem:
            places = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
            return "slice" if all(place is None or isinstance(place, slice) for place in places) else "getitem"
        return name

    def _place(self, node: fx.Node) -> str:
        """The qualified name of the module that ``node`` calls or is in; of what an operation applies, its own."""
        stack = [name.split("@")[0] for name in node.meta.get("nn_module_stack", ())]
        name = str(node.target) if node.op == "call_module" else (stack or [""])[-1]
        owner = name.rpartition(".")[0]
        applied = name != "" and isinstance(self._model.get_submodule(owner), Operation)
        return owner if applied and not isinstance(called(self._graph, node), Operand) else name


_OTHER_SCALES = "several layers that quantize it each in another way"


def _quantizes(layer: QuantLayer) -> bool:
    return layer.input_quantizer is not None and layer.input_quantizer.enabled


def _key(layer: QuantLayer) -> object:
    """What tells the codes of two layers' inputs apart, ``None`` where there are none of one scale."""
    quantizer = layer.tensor_quantizer or layer.input_quantizer
    if quantizer is None or not quantizer.enabled:
        return None
    try:
        codes = input_codes(quantizer)
    except NoFormError:
        return None
    if codes.axis is not None or codes.offset is not None or codes.threshold is not None:
        return None
    return float(codes.scale), int(codes.zero_point), codes.dtype


def _convolves(module: nn.Module | None) -> bool:
    return module is not None and "Conv" in type(module).__name__


def _opaque(module: nn.Module) -> bool:
    """Whether ``module``, a call in a graph, has a forward of its own that could not be traced."""
    return not isinstance(module, QuantLayer) and not type(module).__module__.startswith("torch.nn")


def _modules(model: nn.Module, place: str) -> Iterator[Step]:
    """The operations in ``model``, which is at ``place``, and its norms and other modules with parameters."""
    for name, module in model.named_modules(prefix=place):
        own = any(True for _ in module.parameters(recurse=False))
        if isinstance(module, Operation):
            operands = [one for one in module.modules() if isinstance(one, Operand)]
            reads = all(map(_quantizes, operands))
            title = module.function_name if isinstance(module, Applied) else module.kind
            if module.kind != "norm":
                yield Step(name, title, module.kind, reads)
        elif is_norm(module) or (own and not isinstance(module, QuantWeighted) and "_quantizer" not in name):
            kind = "norm" if is_norm(module) else None
            yield Step(name, type(module).__name__, kind, False, module=module)
