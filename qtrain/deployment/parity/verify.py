"""The gate: an exported file beside the student that it was made of, layer by layer and image by image.

The file's constants are those of the student. Integers give the codes of the simulation, but for ties. What they give
with the file's own biases is shown and not judged. ONNX Runtime without its optimizations gives the simulation's codes
too, but for ties and for what those biases change. Each runtime as it is deployed is at most one step away. In each,
every layer computes from the simulation's own codes, so that a difference shows where it arises and is not handed on;
what stands behind the last codes gives the student's logits, but for rounding.
The predictions are those of the network as a whole: they are the student's, but for images on which a tie or a bias
changed a code.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from qtrain.deployment.integer.fixed import Fixed
from qtrain.deployment.integer.reference import IntegerReference
from qtrain.deployment.integer.values import Value
from qtrain.deployment.onnx.pack import is_packed
from qtrain.deployment.onnx.symbolic import OPSET
from qtrain.deployment.onnx.write import IMAGES, LOGITS, Exported, export, layer_of
from qtrain.deployment.parity.compare import CAUSES, TIE, TIES, Rounded, by_image, causes, counted, gap
from qtrain.deployment.parity.cut import GIVEN, cut
from qtrain.deployment.parity.file import batch_of, changed, read
from qtrain.deployment.parity.runtimes import RUNTIMES, OnnxRuntime, OpenVino, Runtime, chosen
from qtrain.deployment.parity.simulation import Simulated, simulate
from qtrain.deployment.parity.verdict import Disagreement, Tier, Verdict
from qtrain.utils.copies import copied
from qtrain.utils.errors import one_line
from qtrain.utils.processor import saturates_in_16_bits

REFERENCE, FILE, PLAIN = "reference", "reference of the file", "onnxruntime, unoptimized"
SATURATED = "onnxruntime, sums in 16 bits"
"""Names of the comparisons beside those with the runtimes as they are deployed, which have the runtimes' names."""

MANY = 0.05
"""The share of predictions that may differ without a remark."""

AMPLIFIED = (
    "single steps of single layers add up in this network to other predictions on more than one image in twenty; look "
    "at its accuracy on labeled images before it is used, and give it more bits where that is too low"
)

PIXELS = 100_000
"""Pixels that are compared at a time, two images of 224 x 224: all codes of all layers are in memory, several times."""

LOGITS_OFF = 1e-2
"""How far a runtime's logits may be off, as a share of their range, where the last layer's codes are given: the biases
have 32 bits, and functions behind the last layer may be approximated."""

DEPLOYED_STEPS = 1
"""Steps that a layer of an optimized runtime may be away."""


@torch.no_grad()
def verify(
    student: nn.Module,
    images: Iterable[Tensor],
    size: tuple[int, ...],
    file: bytes | None = None,
    *,
    runtimes: Sequence[str] | None = ("onnxruntime",),
) -> Verdict:
    """Compare the ONNX ``file``, or the one that is made here, with ``student`` on batches ``images`` (N, C, H, W).

    ``size`` is that of an image, (C, H, W). ``runtimes`` are names of :data:`RUNTIMES`, ``None`` all that are
    installed. Where the file is for batches of one length, images that do not fill one are left out.

    Raises ``ValueError`` where the student has no form in ONNX, the file is damaged, a runtime is not installed, or
    there are too few images.
    """
    runtimes = chosen(runtimes)
    student = copied(student).cpu()
    given = None if file is None else read(file)
    batch = None if given is None else batch_of(given)
    opset = OPSET if given is None else given.opset_imports.get("", OPSET)
    made = export(student, size, opset=opset, batch=batch, packed=given is not None and is_packed(given))
    model = made.model if given is None else given
    verdict = Verdict([Tier("constants", faults=changed(made.model, model))])
    runs = list(_runs(made, model, runtimes, verdict))
    for some in _in_parts(images) if batch is None else _of_length(images, batch):
        some = some.cpu().float()
        simulated = simulate(student, some, made.lowering.inputs)
        found: dict[str, dict[str, Rounded]] = {}
        for run in list(runs):
            try:
                found[run.tier.name] = run.compare(some, simulated, found, first_image=verdict.images)
            except Exception as error:  # whatever a runtime does with a file
                run.tier.faults.append(f"it does not run: {one_line(error)}")
                runs.remove(run)
        verdict.images += len(some)
    if not verdict.images:
        least = "" if batch is None else f" of a batch of {batch}"
        raise ValueError(f"images: there are too few to compare; give at least those{least or ' of one batch'}")
    for run in runs:
        run.tier.faults += run.judged()
        if isinstance(run.parts, _IntegerParts) and run.parts.floating:
            run.tier.notes.append(_in_floating_point(run.parts.floating))
        if run.tier.name in runtimes and not run.tier.faults and len(run.tier.disagreeing) > MANY * verdict.images:
            run.tier.notes.append(AMPLIFIED)
    return verdict


def _in_floating_point(nodes: Mapping[str, str]) -> str:
    (name, reason), others = next(iter(nodes.items())), len(nodes) - 1
    more = f" and {others} more" if others else ""
    return f"{name}{more} computed in floating point ({reason})"


def _in_parts(images: Iterable[Tensor]) -> Iterator[Tensor]:
    """``images`` in batches of at most :data:`PIXELS`, and of one image at least."""
    for some in images:
        yield from some.split(max(1, PIXELS // some.shape[-2:].numel()))


def _of_length(images: Iterable[Tensor], batch: int) -> Iterator[Tensor]:
    """``images`` in batches of exactly that length, without those that are left over."""
    left: list[Tensor] = []
    for some in images:
        *whole, rest = torch.cat([*left, some]).split(batch)
        yield from whole
        left = [rest]
        if len(rest) == batch:
            yield rest
            left = []


Parts = Callable[[Mapping[str, Tensor]], tuple[dict[str, Rounded], Tensor]]
"""The cut network: images and given codes by name -> the codes of each call of a layer, and the logits."""


@dataclass
class _Run:
    """One way to compute the network, as a whole and cut at its codes, by the call of the layer.

    ``without`` names causes of :data:`CAUSES` with the tiers that compute without them.
    """

    tier: Tier
    whole: Runtime
    parts: Parts
    codes: Mapping[str, str]
    without: Mapping[str, str] = field(default_factory=dict)

    def compare(
        self, batch: Tensor, simulated: Simulated, others: Mapping[str, Mapping[str, Rounded]], *, first_image: int
    ) -> dict[str, Rounded]:
        """Add the differences on ``batch`` to the tier; the codes that the layers gave, by the call of the layer.

        ``others`` are those of the tiers before.
        """
        given = {f"{value}{GIVEN}": simulated.inputs[call].codes for call, value in self.codes.items()}
        found, from_codes = self.parts({IMAGES: batch, **given})
        self.tier.logits_off = max(self.tier.logits_off, _off(simulated.logits, from_codes))
        reasons: list[dict[str, dict[str, int]]] = [{} for _ in batch]
        for call, rounded in found.items():
            expected = simulated.inputs[call]
            without = {cause: others[tier][call].codes for cause, tier in self.without.items() if tier in others}
            from_file = (found if self.tier.name == FILE else others.get(FILE, {})).get(call)
            masks = causes(expected, rounded.codes, from_file, without)
            self.tier.add(counted(call, expected, rounded.codes, masks))
            for cause, mask in masks.items():
                for image, number in enumerate(by_image(mask, len(batch)).tolist()):
                    if number:
                        reasons[image].setdefault(call, {})[cause] = number
        start = time.process_time()
        logits = self.whole({IMAGES: batch})[LOGITS]
        self.tier.cpu_s += time.process_time() - start
        predicted = logits.argmax(dim=1)
        self.tier.predicted += predicted.tolist()
        for image in (predicted != simulated.logits.argmax(dim=1)).nonzero().flatten().tolist():
            one = disagreement(first_image + image, reasons[image], simulated.logits[image], logits[image])
            self.tier.disagreeing.append(one)
        return found

    def judged(self) -> Iterator[str]:
        """What is wrong with this tier, by layer and by image."""
        name = self.tier.name
        for layer in self.tier.layers.values():
            differ = f"{layer.layer}: {layer.differing} of {layer.elements} codes differ"
            if name in (REFERENCE, PLAIN) and layer.unexplained:
                yield f"{differ}: {layer.cause}"
            if name in RUNTIMES and layer.steps > DEPLOYED_STEPS:
                yield f"{differ}, by up to {layer.steps} steps: {layer.cause}"
        bound = TIE if name == REFERENCE else LOGITS_OFF
        if name not in (FILE, SATURATED) and self.tier.logits_off > bound:
            yield f"logits are off by {self.tier.logits_off:.1%} of their range, although all codes are given"
        unlisted = [one for one in self.tier.disagreeing if not one.explained]
        if unlisted and name not in (FILE, SATURATED):
            numbers = ", ".join(str(one.image) for one in unlisted[:5]) + (", ..." if len(unlisted) > 5 else "")
            why = unlisted[0].cause or "; ".join(["although no code differs", *self.tier.notes])
            yield f"images {numbers}: another class is predicted, and no tie explains it ({why})"


def _off(expected: Tensor, found: Tensor) -> float:
    """How far ``found`` is from ``expected`` at most, as a share of the latter's range; endless where one is NaN."""
    known = expected.isfinite()
    if not torch.equal(known, found.isfinite()):
        return math.inf
    if not known.any():
        return 0.0
    away, reach = (found - expected)[known].abs().max(), expected[known].max() - expected[known].min()
    return float(away / (reach or 1.0))


def disagreement(image: int, reasons: Mapping[str, Mapping[str, int]], expected: Tensor, found: Tensor) -> Disagreement:
    """Why ``image`` has another class: the first layer with a code that differs, or two classes that are equal."""
    lead = float(expected.max() - expected[int(found.argmax())])
    if lead <= TIE * float(expected.max() - expected.min()):
        return Disagreement(image, f"its two best classes are {lead:.2g} apart", True)
    explained = any(cause in TIES for counts in reasons.values() for cause in counts)
    layer = next(iter(reasons), "")
    told = ", ".join(f"{number} {CAUSES[cause]}" for cause, number in reasons.get(layer, {}).items())
    return Disagreement(image, f"{layer}: {told}" if layer else "", explained)


def _runs(made: Exported, model: ir.Model, runtimes: Sequence[str], verdict: Verdict) -> Iterator[_Run]:
    """The ways to compute the network, whose tiers are added to ``verdict``; one that is not possible is a fault."""
    for name, source in ((REFERENCE, made.exact), (FILE, model)):
        tier = Tier(name)
        verdict.tiers.append(tier)
        try:
            yield _Run(tier, IntegerReference(source).run, _IntegerParts(source, made), made.codes)
        except Exception as error:  # of a file that is not the student's
            tier.faults.append(f"it does not run: {one_line(error)}")
    ways: list[tuple[str, Callable[[bytes], Runtime], dict[str, str]]] = []
    for name in runtimes:
        if name == "onnxruntime":
            ways.append((PLAIN, lambda data: OnnxRuntime(data, optimized=False), {}))
        ways.append((name, RUNTIMES[name], {"fused": PLAIN}))
        if name == "onnxruntime" and saturates_in_16_bits() and _has_wide_weights(model):
            ways.append((SATURATED, lambda data: OnnxRuntime(data, exactly=False), {"saturated": name}))
    for name, runtime, without in ways:
        tier = Tier(name)
        verdict.tiers.append(tier)
        try:
            pieces = runtime(_bytes(cut(model, set(made.codes.values()))))
            whole = runtime(_bytes(model))
        except Exception as error:  # whatever a runtime does with a file
            tier.faults.append(f"it does not run: {one_line(error)}")
        else:
            if isinstance(whole, OpenVino) and (left_out := whole.left_out):
                tier.notes.append(
                    f"it merges layers with the sums behind them and leaves out the quantizers between "
                    f"({len(left_out)}), the first {left_out[0]}; target=openvino quantizes the shortcut alone"
                )
            yield _Run(tier, whole, _runtime_parts(pieces, made.codes), made.codes, without)


def _has_wide_weights(model: ir.Model) -> bool:
    """Whether two products of a weight with an unsigned byte can be more than 16 bits hold."""
    weights = [value.const_value for value in model.graph.initializers.values() if value.dtype == ir.DataType.INT8]
    return any(int(np.abs(weight.numpy().astype(np.int16)).max(initial=0)) > 64 for weight in weights if weight)


def _runtime_parts(run: Runtime, codes: Mapping[str, str]) -> Parts:
    def parts(inputs: Mapping[str, Tensor]) -> tuple[dict[str, Rounded], Tensor]:
        outputs = run(inputs)
        found = {call: Rounded(outputs[value], torch.ones(())) for call, value in codes.items()}
        return found, outputs[LOGITS]

    return parts


class _IntegerParts:
    """The integer reference of a cut network, which also knows what it has rounded."""

    def __init__(self, model: ir.Model, made: Exported) -> None:
        self._codes, self._forms = made.codes, made.lowering.inputs
        pieces = cut(model, set(made.codes.values()))
        self._reference = IntegerReference(pieces)
        self.floating = self._reference.floating
        self._rounds: dict[str, str] = {}
        self._constants: dict[str, Value] = {}
        for value in pieces.graph.outputs:
            if value.name in made.codes.values():
                node = value.producer()
                while node is not None and node.op_type not in ("QuantizeLinear", "GreaterOrEqual"):
                    node = node.inputs[0].producer() if node.inputs[0] is not None else None
                assert node is not None and node.inputs[0] is not None
                source = node.inputs[0]
                self._rounds[str(value.name)] = str(source.name)
                if source.const_value is not None:  # a factor of the network itself, quantized as an operand
                    self._constants[str(source.name)] = torch.from_numpy(source.const_value.numpy().copy())

    def __call__(self, inputs: Mapping[str, Tensor]) -> tuple[dict[str, Rounded], Tensor]:
        wanted = set(self._rounds.values())
        rounded = {IMAGES: inputs[IMAGES], **self._constants}

        def seen(name: str, value: Value) -> None:
            if name in wanted:
                rounded[name] = value

        outputs = self._reference.run(inputs, seen=seen)
        sources = {value: _plain(rounded[source]) for value, source in self._rounds.items()}
        found = {
            call: Rounded(outputs[value], gap(self._forms[layer_of(call)].steps(sources[value], shifted=True)))
            for call, value in self._codes.items()
        }
        return found, outputs[LOGITS]


def _plain(value: Value) -> Tensor:
    return value.numbers.double() * value.scale if isinstance(value, Fixed) else value


def _bytes(model: ir.Model) -> bytes:
    data: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return data
