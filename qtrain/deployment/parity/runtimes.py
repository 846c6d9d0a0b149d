"""Runtimes that compute an ONNX model on the CPU, all called alike."""

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import final

import numpy as np
import torch
from torch import Tensor

from qtrain.deployment.openvino_core import openvino_core

Runtime = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""Inputs by name -> outputs by name; codes are int64 on both sides."""


@final
class OnnxRuntime:
    """ONNX Runtime on the CPU; without ``optimized`` each node runs as it is written.

    Products of 8-bit weights are summed ``exactly`` on processors without VNNI too (``session.x64quantprecision``).
    """

    def __init__(self, model: bytes, *, optimized: bool = True, exactly: bool = True, threads: int = 0) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        levels = ort.GraphOptimizationLevel
        options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 3
        options.add_session_config_entry("session.x64quantprecision", "1" if exactly else "0")
        self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._types = {given.name: _NUMPY[given.type] for given in self._session.get_inputs()}

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        given = {name: inputs[name].numpy().astype(kind) for name, kind in self._types.items()}
        names = [output.name for output in self._session.get_outputs()]
        found = self._session.run(names, given)
        return {name: _tensor(array) for name, array in zip(names, found, strict=True)}


@final
class OpenVino:
    """OpenVINO on the CPU. What it does not run with integers has 32 bits: by itself it takes bfloat16 where it can."""

    def __init__(self, model: bytes, *, threads: int = 0) -> None:
        core = openvino_core()
        options = {
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        self._compiled = core.compile_model(core.read_model(model), "CPU", options)
        self._types = {given.any_name: given.element_type.to_dtype() for given in self._compiled.inputs}

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = self._compiled({name: inputs[name].numpy().astype(kind) for name, kind in self._types.items()})
        return {name: _tensor(np.array(array)) for output, array in found.items() for name in output.names}

    @property
    def left_out(self) -> list[str]:
        """Quantizers between a layer and a sum that are merged into one operation, which computes without them."""
        found: list[str] = []
        for node in self._compiled.get_runtime_model().get_ops():
            merged = str(node.get_rt_info()["originalLayersNames"].astype(str)).split(",")
            sums = [place for place, name in enumerate(merged) if "Add" in name.split(".")]
            quantizers = [place for place, name in enumerate(merged) if "QuantizeLinear" in name.split(".")]
            found += [merged[place] for place in quantizers if any(other > place for other in sums)]
        return found


RUNTIME_NAMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
"""Package of a runtime -> how it is called."""

RUNTIMES: dict[str, Callable[[bytes], Runtime]] = {"onnxruntime": OnnxRuntime, "openvino": OpenVino}
"""Runtime, by the name of its package, as it is deployed."""


def chosen(names: Sequence[str] | None) -> list[str]:
    """``names`` of runtimes, or those of all that are installed.

    Raises ``ValueError`` where one is unknown or not installed.
    """
    if names is None:
        return [name for name in RUNTIMES if find_spec(name) is not None]
    for name in names:
        if name not in RUNTIMES:
            raise ValueError(f"runtimes: must be among {', '.join(RUNTIMES)}, got {name}")
        if find_spec(name) is None:
            raise ValueError(f"runtimes: {name} is not installed; pip install 'qtrain[export]'")
    return list(dict.fromkeys(names))


def of_any_length(run: Runtime, batch: int | None) -> Runtime:
    """``run``, which takes ``batch`` images at a time, for any number of them: the last ones are filled with zeros."""
    if batch is None:
        return run

    def filled(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        number = len(next(iter(inputs.values())))
        outputs: dict[str, list[Tensor]] = {}
        for start in range(0, number, batch):
            parts = {name: given[start : start + batch] for name, given in inputs.items()}
            whole = {n: torch.cat([p, p.new_zeros(batch - len(p), *p.shape[1:])]) for n, p in parts.items()}
            for name, found in run(whole).items():
                outputs.setdefault(name, []).append(found)
        return {name: torch.cat(found)[:number] for name, found in outputs.items()}

    return filled


_NUMPY = {
    "tensor(float)": np.float32, "tensor(uint8)": np.uint8, "tensor(int8)": np.int8, "tensor(uint16)": np.uint16,
    "tensor(int16)": np.int16,
}  # fmt: skip


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array if array.dtype == np.float32 else array.astype(np.int64))
