"""What the test images say of a run's models: accuracies, and which images they rest on."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import nn

from qtrain.data.base import VisionData
from qtrain.nn.many_bits import by_width, label
from qtrain.pipeline.run_folder import Metrics
from qtrain.pipeline.summary import RIGHT
from qtrain.training.evaluation import evaluate
from qtrain.utils.bit_text import to_text


@final
@dataclass(frozen=True)
class Tested:
    """``metrics`` are accuracies in percent, as ``top1``; of each of many widths too, as ``top1/w4``. ``right`` has the
    fields of :data:`RIGHT` in the same way, as the text of :mod:`qtrain.utils.bit_text`."""

    metrics: Metrics
    right: Mapping[str, str]

    @property
    def fields(self) -> dict[str, object]:
        """Those of the run's summary."""
        return {name: value for name, value in (*self.metrics.items(), *self.right.items()) if "/" not in name}

    def of_width(self, bits: int) -> dict[str, object]:
        """The fields of one of many widths."""
        all, end = (*self.metrics.items(), *self.right.items()), f"/{label(bits)}"
        return {name.removesuffix(end): value for name, value in all if name.endswith(end)}


def on_test_images(models: Mapping[str, nn.Module], data: VisionData, device: torch.device) -> Tested:
    """Evaluate ``models`` on the test images: accuracy -> model. A model of many widths counts with its widest."""
    metrics: Metrics = {}
    right: dict[str, str] = {}
    for name, model in models.items():
        for bits, one in by_width(model).items():
            found = evaluate(one, data.test_dataloader(), device)
            for end in ("", *([f"/{label(bits)}"] if bits is not None else [])):
                metrics.setdefault(name + end, found.top1)
                if name in RIGHT:
                    right.setdefault(RIGHT[name] + end, to_text(found.right))
    return Tested(metrics, right)
