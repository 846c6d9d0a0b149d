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
from qtrain.deployment.profile.layer_file import LAYER, OUTPUT, can_stand_alone, empty_file, layer_file
from qtrain.deployment.profile.sessions import SESSIONS, WARM_UP, Kernel, Session
from qtrain.spec import LayerBits
from qtrain.utils.errors import one_line

CHANGES_LAYOUT = ("Reorder", "ReorderInput", "ReorderOutput", "Transpose")
"""Operators between a runtime's own layout and that of the file, which a network has at its ends alone."""

OF_THE_ENDS = (f"{LAYER}.input.QuantizeLinear", f"{OUTPUT}.Clip", f"{OUTPUT}.BitShift", f"{OUTPUT}.DequantizeLinear")
"""What names of kernels begin with that make codes of the images, or numbers of the last codes: in a network, the
layer before and the layer behind do it."""

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
    """Times of shapes at one width, and why others have none."""

    times: dict[LayerShape, Time]
    failed: dict[LayerShape, str]


def layer_times(geometries: Sequence[LayerGeometry], bits: LayerBits, runs: Runs) -> Measured:
    """Microseconds of each layer of a network at ``bits``, each in a file of its own.

    In a round all layers run in turn, each twice, and the second run counts, as in
    :func:`qtrain.deployment.benchmark.timing.in_turns`. What the call of an empty file takes is subtracted, and so are
    conversions at the ends of a file that a layer does not have inside of a network.
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
    if not files:
        return Measured({}, failed)
    empty = empty_file(next(iter(files)), opset=runs.opset)
    work = [(runs.session(file), _noise(shape)) for shape, file in (*files.items(), (next(iter(files)), empty))]
    seconds = _in_order(work, runs)
    call = Spread.of(seconds.pop()).median
    watching = _watching(runs)
    ends = {shape: _ends(_kernels(files[shape], _noise(shape), runs), watching) for shape in files}
    spreads = {
        shape: Spread.of([max(0.0, MICRO * (one - call) - ends[shape]) for one in found])
        for shape, found in zip(files, seconds, strict=True)
    }
    return Measured({shape: Time(one.median, one.low, one.high) for shape, one in spreads.items()}, failed)


def whole_time(file: bytes, size: Sequence[int], runs: Runs) -> Spread:
    """Microseconds of the network ``file`` for one image of ``size`` (C, H, W)."""
    images = np.random.default_rng(0).random((1, *size), dtype=np.float32)
    (seconds,) = _in_order([(runs.session(file), images)], runs)
    return Spread.of(seconds) * MICRO


def time_of_rest(file: bytes, size: Sequence[int], runs: Runs) -> float:
    """Microseconds of what multiplies nothing in the network ``file``, and of the call of the runtime itself."""
    images = np.random.default_rng(0).random((1, *size), dtype=np.float32)
    watching = _watching(runs)
    found = _kernels(file, images, runs).items()
    kernels = [one for name, one in found if not multiplies(one.operator) and not OF_A_LAYER.search(name)]
    others = sum(max(0.0, one.us - watching) for one in kernels)
    empty = empty_file(LayerShape("", (), tuple(size), (), (), (), (), 1), opset=runs.opset)
    return others + whole_time(empty, size, runs).median


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


def _ends(kernels: Mapping[str, Kernel], watching: float) -> float:
    """Microseconds of conversions that the file of one layer has at its ends."""
    ends = [one for name, one in kernels.items() if one.operator in CHANGES_LAYOUT or name.startswith(OF_THE_ENDS)]
    return sum(max(0.0, one.us - watching) for one in ends)


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
    return np.random.default_rng(0).random((1, *shape.input_shape), dtype=np.float32)
