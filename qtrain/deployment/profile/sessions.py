"""A runtime that computes one file and tells how long each of its kernels took."""

import json
import statistics
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import NamedTuple, final

import numpy as np

from qtrain.deployment.onnx.write import IMAGES
from qtrain.deployment.openvino_core import openvino_core

WARM_UP = 3
"""First runs whose kernels do not count."""


class Kernel(NamedTuple):
    """One operation of the runtime's own graph: what it is, and its microseconds, the mean of the middle half of times.

    Runtimes count whole microseconds, so that a median would be one too.
    """

    operator: str
    us: float


class Session(ABC):
    """One ONNX file in a runtime, with so many threads."""

    @abstractmethod
    def run(self, images: np.ndarray) -> None:
        """Compute the outputs of ``images`` (N, C, H, W) float32."""

    @abstractmethod
    def kernels(self) -> Mapping[str, Kernel]:
        """By name, the kernels of all runs so far; for a session that was made ``profiled``, once, at the end."""


@final
class OnnxRuntimeSession(Session):
    """ONNX Runtime on the CPU, by itself: without the exact sums of processors that have no VNNI."""

    def __init__(self, file: bytes, *, threads: int, profiled: bool = False) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self._folder = tempfile.TemporaryDirectory() if profiled else None
        if self._folder is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(self._folder.name) / "kernels")
        self._session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def run(self, images: np.ndarray) -> None:
        self._session.run(None, {IMAGES: images})

    def kernels(self) -> Mapping[str, Kernel]:
        assert self._folder is not None
        events = json.loads(Path(self._session.end_profiling()).read_text(encoding="utf-8"))
        self._folder.cleanup()
        suffix, seen = "_kernel_time", dict[tuple[str, str], list[float]]()
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith(suffix):
                place = (event["name"].removesuffix(suffix), event["args"]["op_name"])
                seen.setdefault(place, []).append(event["dur"])
        return _typical({place: times[WARM_UP:] for place, times in seen.items()})


@final
class OpenVinoSession(Session):
    """OpenVINO on the CPU, with 32 bits for what it does not compute with integers."""

    def __init__(self, file: bytes, *, threads: int, profiled: bool = False) -> None:
        core = openvino_core()
        options = {
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "PERF_COUNT": "YES" if profiled else "NO",
        }
        self._request = core.compile_model(core.read_model(file), "CPU", options).create_infer_request()
        self._profiled = profiled
        self._runs: list[dict[tuple[str, str], float]] = []

    def run(self, images: np.ndarray) -> None:
        self._request.infer({IMAGES: images}, share_inputs=True)
        if self._profiled:
            self._runs.append({
                (kernel.node_name, kernel.node_type): 1e6 * kernel.real_time.total_seconds()
                for kernel in self._request.profiling_info
                if str(kernel.status).endswith(".EXECUTED")
            })  # fmt: skip

    def kernels(self) -> Mapping[str, Kernel]:
        return _typical(times_of_each(self._runs[WARM_UP:]))


SESSIONS: Mapping[str, Callable[..., Session]] = {"onnxruntime": OnnxRuntimeSession, "openvino": OpenVinoSession}
"""Runtime, by the name of its package."""


def version_of(runtime: str) -> str:
    """The installed version of ``runtime``."""
    return version(runtime)


def times_of_each(runs: Sequence[Mapping[tuple[str, str], float]]) -> dict[tuple[str, str], list[float]]:
    """The microseconds of each kernel in each of the ``runs``.

    A kernel that takes less than what OpenVINO's clock resolves counts as not executed: it takes no time in that run.
    """
    return {place: [run.get(place, 0.0) for run in runs] for place in dict.fromkeys(chain.from_iterable(runs))}


def _typical(seen: Mapping[tuple[str, str], Sequence[float]]) -> dict[str, Kernel]:
    return {name: Kernel(operator, _middle(times)) for (name, operator), times in seen.items()}


def _middle(times: Sequence[float]) -> float:
    quarter = len(times) // 4
    return statistics.mean(sorted(times)[quarter : len(times) - quarter])
