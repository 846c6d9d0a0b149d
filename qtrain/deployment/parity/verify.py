"""The gate: an exported file beside the student that it was made of, layer by layer and image by image.

Five comparisons. The file's constants are those of the student. Integers give the codes of the simulation, but for
ties. What they give with the file's own biases is shown and not judged. The runtime without its optimizations gives the
simulation's codes too, but for ties and for what those biases change. The runtime as it is deployed is at most one step
away. In each, every layer computes from the simulation's own codes, so that a difference shows where it arises and is
not handed on.
"""

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from qtrain.deployment.integer.fixed import Fixed
from qtrain.deployment.integer.reference import IntegerReference, NoIntegerFormError
from qtrain.deployment.integer.values import Value
from qtrain.deployment.onnx.forms import along
from qtrain.deployment.onnx.symbolic import OPSET
from qtrain.deployment.onnx.write import IMAGES, LOGITS, Exported, export
from qtrain.deployment.parity.compare import Difference, Rounded, difference, gap
from qtrain.deployment.parity.cut import GIVEN, cut
from qtrain.deployment.parity.runtimes import OnnxRuntime, Runtime
from qtrain.deployment.parity.simulation import Simulated, simulate
from qtrain.utils.errors import one_line

REFERENCE, FILE, PLAIN, DEPLOYED = "reference", "reference of the file", "onnxruntime, unoptimized", "onnxruntime"
"""Names of the comparisons."""

DEPLOYED_STEPS = 1
"""Steps that a layer of the optimized runtime may be away."""


@dataclass
class Tier:
    """One comparison with the simulation: ``layers`` each from given codes, and ``faults``, what breaks the bound.

    ``disagreeing`` are the images, by their number, whose predicted class differs when the whole network runs.
    """

    name: str
    layers: dict[str, Difference] = field(default_factory=dict)
    disagreeing: list[int] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def add(self, found: Difference) -> None:
        before = self.layers.get(found.layer)
        self.layers[found.layer] = found if before is None else before + found

    @property
    def first(self) -> Difference | None:
        """The first layer that differs."""
        return next((layer for layer in self.layers.values() if layer.differing), None)


@dataclass
class Verdict:
    """What :func:`verify` found; ``images`` is the number of images."""

    tiers: list[Tier]
    images: int = 0

    @property
    def passed(self) -> bool:
        return not any(tier.faults for tier in self.tiers)


@torch.no_grad()
def verify(student: nn.Module, images: Iterable[Tensor], size: tuple[int, ...], file: bytes | None = None) -> Verdict:
    """Compare the ONNX ``file``, or the one that is made here, with ``student`` on batches ``images`` (N, C, H, W).

    ``size`` is that of an image, (C, H, W). Raises ``ValueError`` where the student has no form in ONNX, or the file is
    damaged.
    """
    student = copy.deepcopy(student).cpu()
    given = None if file is None else _read(file)
    made = export(student, size, opset=OPSET if given is None else given.opset_imports.get("", OPSET))
    model = made.model if given is None else given
    constants = Tier("constants", faults=list(_changed(made.model, model)))
    verdict = Verdict([constants])
    try:
        runs = list(_runs(made, model, verdict))
    except Exception as error:  # whatever a runtime does with a file that is not the student's
        if not constants.faults:
            raise
        constants.faults.append(f"it does not run: {one_line(error)}")
        return verdict
    for batch in images:
        batch = batch.cpu().float()
        simulated = simulate(student, batch, made.lowering.inputs)
        from_file: dict[str, Rounded] = {}
        for run in runs:
            found = run.compare(batch, simulated, from_file, first_image=verdict.images)
            if run.tier.name == FILE:
                from_file = found
        verdict.images += len(batch)
    for run in runs:
        run.tier.faults += run.judged()
    return verdict


Parts = Callable[[Mapping[str, Tensor]], dict[str, Rounded]]
"""The cut network: images and given codes by name -> the codes of each call of a layer."""


class _Run:
    """One way to compute the network, as a whole and cut at its codes."""

    def __init__(self, name: str, whole: Runtime, parts: Parts, codes: dict[str, str]) -> None:
        self.tier, self._whole, self._parts, self._codes = Tier(name), whole, parts, codes

    def compare(
        self, batch: Tensor, simulated: Simulated, from_file: dict[str, Rounded], *, first_image: int
    ) -> dict[str, Rounded]:
        """Add the differences on ``batch`` to the tier; the codes that the layers gave, by the call of the layer."""
        given = {f"{value}{GIVEN}": simulated.inputs[call].codes for call, value in self._codes.items()}
        found = self._parts({IMAGES: batch, **given})
        for call, rounded in found.items():
            self.tier.add(difference(call, simulated.inputs[call], rounded.codes, from_file.get(call)))
        logits = self._whole({IMAGES: batch})[LOGITS]
        differ = (logits.argmax(dim=1) != simulated.logits.argmax(dim=1)).nonzero().flatten()
        self.tier.disagreeing += [first_image + int(i) for i in differ]
        return found

    def judged(self) -> Iterator[str]:
        """What is wrong with this tier, by layer."""
        for layer in self.tier.layers.values():
            differ = f"{layer.layer}: {layer.differing} of {layer.elements} codes differ"
            if self.tier.name in (REFERENCE, PLAIN) and layer.unexplained:
                yield f"{differ}: {layer.cause}"
            if self.tier.name == DEPLOYED and layer.steps > DEPLOYED_STEPS:
                yield f"{differ}, by up to {layer.steps} steps"


def _runs(made: Exported, model: ir.Model, verdict: Verdict) -> Iterator[_Run]:
    """The ways to compute the network, whose tiers are added to ``verdict``; one that is not possible is a fault."""
    for name, source in ((REFERENCE, made.exact), (FILE, model)):
        try:
            whole, parts = IntegerReference(source), _IntegerParts(source, made.codes)
        except NoIntegerFormError as error:
            verdict.tiers.append(Tier(name, faults=[str(error)]))
            continue
        run = _Run(name, whole.run, parts, made.codes)
        verdict.tiers.append(run.tier)
        yield run
    for name, optimized in ((PLAIN, False), (DEPLOYED, True)):
        pieces = OnnxRuntime(_bytes(cut(model, set(made.codes.values()))), optimized=optimized)
        whole_run = OnnxRuntime(_bytes(model), optimized=optimized)
        run = _Run(name, whole_run, _runtime_parts(pieces, made.codes), made.codes)
        verdict.tiers.append(run.tier)
        yield run


def _runtime_parts(run: Runtime, codes: dict[str, str]) -> Parts:
    def parts(inputs: Mapping[str, Tensor]) -> dict[str, Rounded]:
        outputs = run(inputs)
        return {call: Rounded(outputs[value], torch.ones(())) for call, value in codes.items()}

    return parts


class _IntegerParts:
    """The integer reference of a cut network, which also knows what it has rounded."""

    def __init__(self, model: ir.Model, codes: dict[str, str]) -> None:
        self._codes, pieces = codes, cut(model, set(codes.values()))
        self._reference = IntegerReference(pieces)
        self._rounds: dict[str, tuple[str, Tensor]] = {}
        for value in pieces.graph.outputs:
            if value.name in codes.values():
                node = value.producer()
                while node is not None and node.op_type != "QuantizeLinear":
                    node = node.inputs[0].producer() if node.inputs[0] is not None else None
                assert node is not None and node.inputs[0] is not None and node.inputs[1] is not None
                assert node.inputs[1].const_value is not None
                scale = torch.from_numpy(np.array(node.inputs[1].const_value.numpy())).double()
                self._rounds[str(value.name)] = str(node.inputs[0].name), scale

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Rounded]:
        wanted = {source for source, _ in self._rounds.values()}
        rounded: dict[str, Value] = {IMAGES: inputs[IMAGES]}

        def seen(name: str, value: Value) -> None:
            if name in wanted:
                rounded[name] = value

        outputs = self._reference.run(inputs, seen=seen)
        return {
            call: Rounded(outputs[value], gap(_steps(rounded[self._rounds[value][0]], self._rounds[value][1])))
            for call, value in self._codes.items()
        }


def _steps(value: Value, scale: Tensor) -> Tensor:
    x = value.numbers.double() * value.scale if isinstance(value, Fixed) else value
    return x / along(scale, 1, x.ndim)


def _changed(made: ir.Model, model: ir.Model) -> Iterator[str]:
    """By layer, which constants and nodes of ``model`` are not those that the student gives."""
    for name, value in made.graph.initializers.items():
        other = model.graph.initializers.get(name)
        if other is None or other.const_value is None:
            yield f"{name}: the file lacks it"
            continue
        assert value.const_value is not None
        expected, found = value.const_value.numpy(), other.const_value.numpy()
        if expected.dtype != found.dtype or expected.shape != found.shape:
            yield f"{name}: {found.dtype} of shape {found.shape}, not {expected.dtype} of {expected.shape}"
        elif differ := int(np.count_nonzero(_octets(expected) != _octets(found))):
            yield f"{name}: {differ} of its bytes are not the student's"
    ours, theirs = [_described(node) for node in made.graph], [_described(node) for node in model.graph]
    if ours != theirs:
        pairs = itertools.zip_longest(ours, theirs, fillvalue="nothing")
        ours_first, theirs_first = next((a, b) for a, b in pairs if a != b)
        yield f"{theirs_first.split()[0]}: the file computes something else, the student {ours_first.split()[0]}"


def _octets(array: np.ndarray) -> np.ndarray:
    return np.frombuffer(np.ascontiguousarray(array).tobytes(), dtype=np.uint8)


def _described(node: ir.Node) -> str:
    attributes = sorted(f"{a.name}={_stored(getattr(a, 'value', None))}" for a in node.attributes.values())
    return f"{node.name} {node.op_type} {[v.name if v else None for v in node.inputs]} {attributes}"


def _stored(attribute: object) -> object:
    """``attribute`` as a file holds it, a floating-point number in 32 bits."""
    return float(np.float32(attribute)) if isinstance(attribute, float) else attribute


def _read(file: bytes) -> ir.Model:
    try:
        model = onnx.load_from_string(file)
        onnx.checker.check_model(model)
        return ir.from_proto(model)
    except Exception as error:  # whatever a parser does with foreign bytes
        reason = one_line(error)
        raise ValueError(f"the file is damaged or no ONNX model ({reason}); export it anew") from error


def _bytes(model: ir.Model) -> bytes:
    data: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return data
