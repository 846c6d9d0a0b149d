"""Times of layers, each measured alone, in turns and in the order of their network."""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from qtrain.costs.geometry import LayerGeometry
from qtrain.costs.latency_table import LayerShape, Time
from qtrain.deployment.benchmark.timing import Spread
from qtrain.deployment.onnx.write import LOGITS
from qtrain.deployment.profile.layer_file import LAYER, OUTPUT, can_stand_alone, empty_file, layer_file
from qtrain.deployment.profile.sessions import SESSIONS, WARM_UP, Kernel, Session
from qtrain.spec import LayerBits
from qtrain.utils.errors import one_line

NOT_OF_A_LAYER = ("Reorder", "ReorderInput", "ReorderOutput", "Transpose", "Slice", "StridedSlice")
"""Operators between a runtime's own layout and that of the file, which a network has at its ends alone, and the one
that takes a column of a layer's outputs."""

OF_THE_ENDS = (
    f"{LAYER}.input.QuantizeLinear", f"{OUTPUT}.Clip", f"{OUTPUT}.BitShift", f"{OUTPUT}.DequantizeLinear", LOGITS
)  # fmt: skip
"""What names of kernels begin with that make codes of the images, or numbers of the last codes, of which a column is
taken: in a network, the layer before and the layer behind do it."""

OF_A_LAYER = re.compile(r"\.input\.(Clip|BitShift)")
"""In names of kernels: what narrows a layer's input to few bits, which is part of the time of this layer."""

MICRO = 1e6
"""Microseconds of a second."""

_PROBE = LayerShape("conv2d", (8, 8, 1, 1), (8, 8, 8), (8, 8, 8), (1, 1), ((0, 0), (0, 0)), (1, 1), 1)
"""A layer whose kernels take hardly any time."""


@dataclass(frozen=True)
class Runs:
    """How to measure: the ``runtime`` and its ``threads``, so many ``rounds``, and how the files are written."""

    runtime: str
    threads: int
    rounds: int
    opset: int
    packed: bool = False

    @property
    def clock(self) -> Callable[[], float]:
        """Of one thread, processor time: on an idle machine the same as time, and on a busy one free of the others'."""
        return time.thread_time if self.threads == 1 else time.perf_counter

    def session(self, file: bytes, *, profiled: bool = False) -> Session:
        """``file`` in the runtime. Raises ``ValueError`` in one line where it does not run there."""
        try:
            return SESSIONS[self.runtime](file, threads=self.threads, profiled=profiled)
        except Exception as error:  # whatever a runtime does with a file
            raise ValueError(f"{self.runtime} does not run it: {one_line(error)}") from error


@dataclass(frozen=True)
class Measured:
    """Times of shapes at one width, why others have none, and the microseconds of the whole network beside them."""

    times: dict[LayerShape, Time]
    failed: dict[LayerShape, str]
    whole: Spread


def layer_times(
    geometries: Sequence[LayerGeometry], bits: LayerBits, runs: Runs, *, network: bytes, size: Sequence[int]
) -> Measured:
    """Microseconds of each layer of a network at ``bits``, each in a file of its own, and of the file ``network``.

    ``size`` is that of an image (C, H, W). In a round the network and all layers run in turn, each twice, and the
    second run counts, as in :func:`qtrain.deployment.benchmark.timing.in_turns`: what else the machine does slows all
    of them. What the call of an empty file takes is subtracted. Of the rest a layer has the share of its own kernels:
    inside of a network it does not have the conversions at the ends of its file. The share comes from the runtime's own
    times of kernels, all taken together, so that it does not depend on how fast the machine was then.
    """
    files: dict[LayerShape, bytes] = {}
    failed: dict[LayerShape, str] = {}
    for shape in dict.fromkeys(map(LayerShape.of, geometries)):
        if not can_stand_alone(shape):
            continue
        try:
            files[shape] = layer_file(shape, bits, opset=runs.opset, packed=runs.packed)
            runs.session(files[shape])
        except ValueError as error:
            failed[shape] = str(error)
    whole = (runs.session(network), _images(size))
    if not files:
        return Measured({}, failed, Spread.of(_in_order([whole], runs)[0]) * MICRO)
    empty = empty_file(next(iter(files)), opset=runs.opset)
    alone = [(runs.session(file), _noise(shape)) for shape, file in (*files.items(), (next(iter(files)), empty))]
    of_whole, *seconds = _in_order([whole, *alone], runs)
    watching = _watching(runs)
    column = sum(one.us for one in _kernels(empty, _noise(next(iter(files))), runs).values())
    call = max(0.0, Spread.of(seconds.pop()).median - max(0.0, column - watching) / MICRO)
    spreads: dict[LayerShape, Spread] = {}
    for (shape, file), found in zip(files.items(), seconds, strict=True):
        own = _own_share(_kernels(file, _noise(shape), runs), watching)
        spreads[shape] = Spread.of([MICRO * own * max(0.0, one - call) for one in found])
    times = {shape: Time(one.median, one.low, one.high) for shape, one in spreads.items()}
    return Measured(times, failed, Spread.of(of_whole) * MICRO)


def time_of_rest(file: bytes, size: Sequence[int], runs: Runs) -> float:
    """Microseconds of what multiplies nothing in the network ``file``, and of the call of the runtime itself."""
    images = _images(size)
    watching = _watching(runs)
    found = _kernels(file, images, runs).items()
    kernels = [one for name, one in found if not multiplies(one.operator) and not OF_A_LAYER.search(name)]
    others = sum(max(0.0, one.us - watching) for one in kernels)
    empty = empty_file(LayerShape("", (), tuple(size), (), (), (), (), 1), opset=runs.opset)
    (call,) = _in_order([(runs.session(empty), images)], runs)
    return others + MICRO * Spread.of(call).median


def multiplies(operator: str) -> bool:
    """Whether a kernel is a convolution or a matrix product, by how runtimes call them."""
    return any(word in operator for word in ("Conv", "Gemm", "MatMul", "FullyConnected")) and operator != "Convert"


def memory_speed() -> float:
    """Bytes a second that a copy of a large array reads and writes."""
    source = np.ones(2**24, dtype=np.float32)
    target = np.empty_like(source)
    seconds = []
    for _ in range(5):
        start = time.thread_time()
        np.copyto(target, source)
        seconds.append(time.thread_time() - start)
    return 2 * source.nbytes / min(seconds)


def _in_order(work: Sequence[tuple[Session, np.ndarray]], runs: Runs) -> list[list[float]]:
    """The seconds of each session in each round."""
    seconds: list[list[float]] = [[] for _ in work]
    clock = runs.clock
    for _ in range(runs.rounds):
        for (session, images), found in zip(work, seconds, strict=True):
            session.run(images)
            start = clock()
            session.run(images)
            found.append(clock() - start)
    return seconds


def _own_share(kernels: Mapping[str, Kernel], watching: float) -> float:
    """What part of the time of one layer's file is the layer's own."""
    times = {name: max(0.0, one.us - watching) for name, one in kernels.items()}
    own = sum(us for name, us in times.items() if not is_end(name, kernels[name].operator))
    return own / total if (total := sum(times.values())) else 1.0


def is_end(name: str, operator: str) -> bool:
    """Whether a kernel in the file of one layer is none of the layer's own, by its name and operator."""
    return operator in NOT_OF_A_LAYER or (name.startswith(OF_THE_ENDS) and not multiplies(operator))


def _kernels(file: bytes, images: np.ndarray, runs: Runs) -> Mapping[str, Kernel]:
    session = runs.session(file, profiled=True)
    for _ in range(WARM_UP + runs.rounds):
        session.run(images)
    return session.kernels()


@cache
def _watching(runs: Runs) -> float:
    """Microseconds that a runtime's own clock adds to each kernel: what all of a small file's have too much."""
    file, images = layer_file(_PROBE, LayerBits(8, 8), opset=runs.opset), _noise(_PROBE)
    empty = empty_file(_PROBE, opset=runs.opset)
    whole, call = (Spread.of(one).low for one in _in_order([(runs.session(f), images) for f in (file, empty)], runs))
    kernels = _kernels(file, images, runs)
    return max(0.0, sum(one.us for one in kernels.values()) - MICRO * (whole - call)) / max(1, len(kernels))


def _noise(shape: LayerShape) -> np.ndarray:
    return _images(shape.input_shape)


def _images(size: Sequence[int]) -> np.ndarray:
    """One image of ``size`` (C, H, W) of random numbers from 0 to 1."""
    return np.random.default_rng(0).random((1, *size), dtype=np.float32)
