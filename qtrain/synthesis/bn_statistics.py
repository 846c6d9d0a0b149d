"""Images optimized until their batch norm statistics are those of the training data: ZeroQ and DeepInversion.

Starting from noise, the pixels of a batch minimize

    sum over models of  statistics * D(x) + label * CE(f(x), y)   +  total_variation * TV(x) + norm * mean(x^2)

with D the distance of :class:`StatisticsMatch`, y the batch's labels, and x the randomly augmented batch. With only
the first term it is ZeroQ (Cai et al. 2020, arXiv 2001.00281, eq. 2), with all of them DeepInversion (Yin et al. 2020,
arXiv 1912.08795, eq. 1-4).
"""

from collections.abc import Sequence
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtrain.spec import DataInfo
from qtrain.synthesis.base import Made, Synthesis
from qtrain.synthesis.init_noise import balanced_labels
from qtrain.synthesis.model_outputs import ModelOutput
from qtrain.synthesis.optimized_batch import OptimizedBatch
from qtrain.synthesis.priors import squared_norm, total_variation
from qtrain.synthesis.statistics import statistics_layers
from qtrain.utils.checks import check_range


@final
class BNStatistics(Synthesis):
    """Batches from batch norm's statistics, labels, and priors on images; see the module for the objective.

    ``statistics``, ``label``, ``total_variation`` and ``norm`` are the weights of the objective's terms, and the rest
    says how a batch is optimized (:class:`OptimizedBatch`). ``compile`` saves time on a CPU from about a thousand
    images on.

    Statistics are those of a whole batch. With few images they vary by chance, so ``batch_size`` is large.
    """

    def __init__(
        self,
        *,
        batch_size: int = 128,
        steps: int = 80,
        lr: float = 0.2,
        statistics: float = 1.0,
        label: float = 1.0,
        total_variation: float = 0.0,
        norm: float = 0.0,
        shift: int = 4,
        flip: bool = True,
        smallest_crop: float = 1.0,
        crop_steps: float = 0.5,
        natural_start: bool = True,
        compile: bool = False,
    ) -> None:
        check_range("BNStatistics", "[1, inf)", batch_size=batch_size)
        check_range("BNStatistics", "[0, inf)", statistics=statistics, label=label)
        check_range("BNStatistics", "[0, inf)", total_variation=total_variation, norm=norm)
        if statistics == 0 and label == 0:
            raise ValueError("BNStatistics: statistics and label are both 0, and the models say nothing; raise one")
        self.batch_size = batch_size
        self._batch = OptimizedBatch(
            steps=steps,
            lr=lr,
            shift=shift,
            flip=flip,
            smallest_crop=smallest_crop,
            crop_steps=crop_steps,
            natural_start=natural_start,
            compile=compile,
        )
        self._statistics, self._label = statistics, label
        self._total_variation, self._norm = total_variation, norm

    def check(self, models: Sequence[nn.Module]) -> None:
        for model in models:
            statistics_layers(model)

    def make(
        self, models: Sequence[nn.Module], info: DataInfo, *, number: int, seed: int, device: torch.device
    ) -> Made:
        labels = balanced_labels(info, batch_size=self.batch_size, number=number, device=device)

        def objective(x: Tensor, outputs: Sequence[ModelOutput]) -> Tensor:
            told = [
                self._statistics * output.statistics + self._label * F.cross_entropy(output.logits, labels)
                for output in outputs
            ]
            return torch.stack(told).mean() + self._total_variation * total_variation(x) + self._norm * squared_norm(x)

        return self._batch.make(models, info, objective, labels, number=number, seed=seed)
