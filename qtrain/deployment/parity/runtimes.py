"""Runtimes that compute an ONNX model on the CPU, all called alike."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

Runtime = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""Inputs by name -> outputs by name; codes are int64 on both sides."""


class OnnxRuntime:
    """ONNX Runtime on the CPU; without ``optimized`` each node runs as it is written.

    Products of 8-bit weights are summed exactly on processors without VNNI too (``session.x64quantprecision``).
    """

    def __init__(self, model: bytes, *, optimized: bool, threads: int = 0) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        levels = ort.GraphOptimizationLevel
        options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 3
        options.add_session_config_entry("session.x64quantprecision", "1")
        self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._types = {given.name: _NUMPY[given.type] for given in self._session.get_inputs()}

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        given = {name: inputs[name].numpy().astype(kind) for name, kind in self._types.items()}
        names = [output.name for output in self._session.get_outputs()]
        found = self._session.run(names, given)
        return {name: _tensor(array) for name, array in zip(names, found, strict=True)}


_NUMPY = {
    "tensor(float)": np.float32, "tensor(uint8)": np.uint8, "tensor(int8)": np.int8, "tensor(uint16)": np.uint16,
    "tensor(int16)": np.int16,
}  # fmt: skip


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array if array.dtype == np.float32 else array.astype(np.int64))
