"""What an exported student is held against: full precision, and what the runtime itself quantizes of that."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import onnxruntime as ort
import torch
from torch import Tensor, nn

from qtrain.deployment.benchmark.runtime_int8 import runtime_int8
from qtrain.deployment.benchmark.timing import Times, in_turns
from qtrain.deployment.onnx.write import IMAGES, LOGITS, export
from qtrain.utils.processor import saturates_in_16_bits

EXPORT, FULL_PRECISION, RUNTIME_INT8 = "export", "full precision", "runtime's INT8"
"""Names of the three files."""


def rivals(network: nn.Module, calibration: Sequence[Tensor], size: Sequence[int], *, opset: int) -> dict[str, bytes]:
    """``network`` as an ONNX file in full precision, and as the runtime quantizes that file.

    ``calibration`` are the batches (N, C, H, W) that gave the student its ranges, ``size`` is (C, H, W). Raises
    ``ValueError`` where torch cannot export the network.
    """
    full_precision = export(network, tuple(size), opset=opset).to_bytes()
    return {FULL_PRECISION: full_precision, RUNTIME_INT8: runtime_int8(full_precision, calibration)}


def timed(files: Mapping[str, bytes], images: Tensor, *, rounds: int, threads: int) -> Times:
    """The seconds that each of the ONNX ``files`` takes for ``images`` (N, C, H, W) in ONNX Runtime, in turns.

    Of one thread, this is processor time: on an idle machine the same as time, and on a busy one free of the others'.
    """
    clock = time.thread_time if threads == 1 else time.perf_counter
    calls = {name: _call(_session(name, file, threads), images) for name, file in files.items()}
    return in_turns(calls, rounds=rounds, clock=clock)


def predicted(files: Mapping[str, bytes], batches: Iterable[Tensor], *, threads: int) -> dict[str, Tensor]:
    """The classes (N,) that each of ``files`` predicts for the images of ``batches`` (N, C, H, W)."""
    sessions = {name: _session(name, file, threads) for name, file in files.items()}
    found: dict[str, list[Tensor]] = {name: [] for name in files}
    for batch in batches:
        for name, session in sessions.items():
            (logits,) = session.run([LOGITS], {IMAGES: batch.numpy()})
            found[name].append(torch.from_numpy(logits).argmax(dim=1))
    return {name: torch.cat(classes) for name, classes in found.items()}


def _call(session: ort.InferenceSession, images: Tensor) -> Callable[[], object]:
    given = {IMAGES: images.numpy()}
    return lambda: session.run(None, given)


def _session(name: str, file: bytes, threads: int) -> ort.InferenceSession:
    """The export as its own program runs it, the others as the runtime runs them by itself."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Exact sums also without VNNI; with it, the option would only choose a slower kernel.
    exactly = name == EXPORT and saturates_in_16_bits()
    options.add_session_config_entry("session.x64quantprecision", "1" if exactly else "0")
    options.add_session_config_entry("session.force_spinning_stop", "1")  # idle threads leave the cores to the others
    return ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
