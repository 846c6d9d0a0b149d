"""Measures the student's quantizers during training, logs the metrics, and warns when a layer collapses.

At intervals the metrics are computed by a forward of the current batch in eval mode. This is outside of the training
step and its compiled graph, which neither change nor wait.
"""

import logging
from typing import Any, final

import pytorch_lightning as pl
from torch import Tensor

from qtrain.tracking.metric_log import MetricLog
from qtrain.training.health import Codes, examine, symptoms
from qtrain.training.student import student_of
from qtrain.utils.checks import check_range

log = logging.getLogger(__name__)


@final
class Health(pl.Callback):
    """Every ``every_n_steps`` optimizer steps writes :func:`examine` to ``metric_log`` and logs new symptoms.

    A warning names the layer, the metric and a remedy, once for each layer and kind. Agreement is measured with
    ``pl_module.teacher_logits``, the teacher's outputs for the batch. Measurements and past warnings are in the resume
    point.
    """

    def __init__(self, *, metric_log: MetricLog, every_n_steps: int = 100) -> None:
        super().__init__()
        check_range("Health", "[1, inf)", every_n_steps=every_n_steps, hint="fit.health_every_steps=0 is never")
        self.metric_log = metric_log
        self.every_n_steps = every_n_steps
        self._row_step = -1
        self._codes: dict[str, Codes] = {}
        self._first_scales: dict[str, float] = {}
        self._said: set[tuple[str, str]] = set()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step % self.every_n_steps != 0 or step == self._row_step:
            return
        self._row_step = step
        image, answer = batch[0], getattr(pl_module, "teacher_logits", None)
        teacher = answer if isinstance(answer, Tensor) and len(answer) == len(image) else None
        found = examine(student_of(pl_module), image, former=self._codes, teacher_logits=teacher)
        self.metric_log.write(trainer, {f"train/{name}": value for name, value in found.metrics.items()})
        self._codes = found.codes
        for place in found.bits:
            if (scale := found.metrics.get(f"scale/{place}")) is not None:
                self._first_scales.setdefault(place, scale)
        classes = 0 if teacher is None else teacher.shape[1]
        for symptom in symptoms(found, self._first_scales, images=len(image), classes=classes):
            if (symptom.kind, symptom.place) not in self._said:
                self._said.add((symptom.kind, symptom.place))
                if trainer.is_global_zero:
                    log.warning("step %d: %s: %s; %s", step, symptom.place, symptom.says, symptom.remedy)

    # While gradients accumulate, several batches end at one step; a resumed run must not write its row again.
    def state_dict(self) -> dict[str, Any]:
        return {
            "row_step": self._row_step,
            "bits": {place: bits for place, (bits, _) in self._codes.items()},
            "codes": {place: codes for place, (_, codes) in self._codes.items()},
            "first_scales": self._first_scales,
            "said": sorted(self._said),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._row_step = int(state_dict["row_step"])
        self._codes = {place: (int(state_dict["bits"][place]), codes) for place, codes in state_dict["codes"].items()}
        self._first_scales = dict(state_dict["first_scales"])
        self._said = {(kind, place) for kind, place in state_dict["said"]}
