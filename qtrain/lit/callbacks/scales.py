"""What the quantizers do while they learn: their scales, and how much they clip.

Floor 5. The figures come from one forward of the current batch in eval mode, outside the training step and its
compiled graph, every so many steps; the step itself is not touched and does not wait.
"""

from __future__ import annotations

from typing import Any, final

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from qtrain.lit.callbacks.journal import MetricJournal
from qtrain.lit.student import student_of
from qtrain.modes import evaluating
from qtrain.nn import Operand, QuantLayer
from qtrain.quantizers.base import Quantizer
from qtrain.storage.affine import AffineTensor
from qtrain.storage.base import QTensor


def clipped_fraction(stored: AffineTensor, x: Tensor) -> Tensor:
    """The share of ``x`` that its quantizer's range cuts off, 0-dim: where the error exceeds half a step.

    Rounding alone is off by at most half a step; the tolerance covers float32, for values of up to 16 bits.
    """
    error = (stored.dequantize() - x.float()).abs()
    step = stored.granularity.expand(stored.scale, tuple(x.shape))
    return (error > 0.5 * step + 1e-6 * x.abs()).float().mean()


def relative_error(stored: QTensor, x: Tensor) -> Tensor:
    """``|x^ - x|^2 / |x|^2``, 0-dim: what of the signal's energy quantization changes."""
    x = x.float()
    return (stored.dequantize() - x).square().sum() / x.square().sum().clamp(min=torch.finfo(torch.float32).tiny)


@torch.no_grad()
def scale_statistics(student: nn.Module, image: Tensor) -> dict[str, float]:
    """The relative error of each enabled quantizer in ``student``, over ``image`` (N, C, H, W), and its scale.

    Keys ``error/<layer>.weight``, ``error/<layer>.input`` and so on; of evenly spaced codes also ``scale/``, the mean
    scale, and ``clipped/``, the share of values beyond the range. The modes of all modules are restored; nothing
    else changes. All values are read from the device at once.
    """
    figures: dict[str, Tensor] = {}
    handles = []

    def look(name: str, quantizer: Quantizer | None, x: Tensor) -> None:
        if quantizer is not None and quantizer.enabled:
            stored = quantizer.quantize(x.float())
            figures[f"error/{name}"] = relative_error(stored, x)
            if isinstance(stored, AffineTensor):
                figures[f"scale/{name}"] = stored.scale.float().mean()
                figures[f"clipped/{name}"] = clipped_fraction(stored, x)

    def before(name: str, layer: Any, x: Tensor) -> None:
        if not isinstance(layer, Operand):
            look(f"{name}.weight", layer.weight_quantizer, layer.effective_weight())
        look(f"{name}.input", layer.input_quantizer, x)

    for name, module in student.named_modules():
        if isinstance(module, QuantLayer):
            handles.append(module.register_forward_pre_hook(lambda m, args, name=name: before(name, m, args[0])))
    if not handles:
        return {}
    try:
        with evaluating(student), torch.compiler.set_stance("force_eager"):
            student(image)
    finally:
        for handle in handles:
            handle.remove()
    if not figures:
        return {}
    return dict(zip(figures, torch.stack(list(figures.values())).tolist(), strict=True))


@final
class ScaleStatistics(pl.Callback):
    """Writes ``scale_statistics`` of the student to ``journal`` every ``every_n_steps`` optimizer steps."""

    def __init__(self, *, journal: MetricJournal, every_n_steps: int = 200) -> None:
        super().__init__()
        if every_n_steps < 1:
            raise ValueError(f"ScaleStatistics: every_n_steps must be at least 1, got {every_n_steps}")
        self.journal = journal
        self.every_n_steps = every_n_steps
        self._row_step = -1

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step % self.every_n_steps != 0 or step == self._row_step:
            return
        self._row_step = step
        statistics = scale_statistics(student_of(pl_module), batch[0])
        self.journal.write(trainer, {f"train/{name}": value for name, value in statistics.items()})

    # While gradients accumulate, several batches end at one step; a resumed run must know that its row is written.
    def state_dict(self) -> dict[str, Any]:
        return {"row_step": self._row_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._row_step = int(state_dict["row_step"])
