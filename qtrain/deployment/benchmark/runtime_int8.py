"""The runtime's own quantization of a full-precision network, the rival of an exported student."""

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor

from qtrain.deployment.onnx.write import IMAGES


def runtime_int8(full_precision: bytes, images: Sequence[Tensor]) -> bytes:
    """The ONNX file ``full_precision`` as ``onnxruntime.quantization`` makes it 8 bits wide, the usual way.

    Static, with quantize and dequantize nodes, signed weights with a scale for each output channel, unsigned inputs,
    scales from the smallest and largest values on ``images``, batches (N, C, H, W).
    """
    with tempfile.TemporaryDirectory() as folder, _quiet():
        given, prepared, made = (Path(folder) / f"{name}.onnx" for name in ("given", "prepared", "made"))
        given.write_bytes(full_precision)
        quant_pre_process(given, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared, made, _Batches(images), quant_format=QuantFormat.QDQ, per_channel=True,
            weight_type=QuantType.QInt8, activation_type=QuantType.QUInt8,
        )  # fmt: skip
        return made.read_bytes()


class _Batches(CalibrationDataReader):  # type: ignore[misc]  # the package has no types
    def __init__(self, images: Sequence[Tensor]) -> None:
        self._batches = iter(images)

    def get_next(self) -> dict[str, object] | None:
        batch = next(self._batches, None)
        return None if batch is None else {IMAGES: batch.numpy()}


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, advice that the quantizer gives by the root logger is not shown."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
