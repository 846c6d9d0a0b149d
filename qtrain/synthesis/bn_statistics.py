"""Images optimized until their batch norm statistics are those of the training data: ZeroQ and DeepInversion.

Starting from noise, the pixels of a batch minimize

    sum over models of  statistics * D(x) + label * CE(f(x), y)   +  total_variation * TV(x) + norm * mean(x^2)

with D the distance of :class:`StatisticsMatch`, y the batch's labels, and x the randomly augmented batch. With only
the first term it is ZeroQ (Cai et al. 2020, arXiv 2001.00281, eq. 2), with all of them DeepInversion (Yin et al. 2020,
arXiv 1912.08795, eq. 1-4).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtrain.spec import DataInfo
from qtrain.synthesis.augment import StepAugmentation
from qtrain.synthesis.base import Made, Synthesis, to_pixels
from qtrain.synthesis.init_noise import balanced_labels, natural_noise, white_noise
from qtrain.synthesis.model_outputs import FrozenModels
from qtrain.synthesis.optimize import ImageOptimizer, image_metrics
from qtrain.synthesis.priors import squared_norm, total_variation
from qtrain.synthesis.statistics import statistics_layers
from qtrain.utils.checks import check_range


@final
class BNStatistics(Synthesis):
    """Batches from batch norm's statistics, labels, and priors on images; see the module for the objective.

    ``steps`` and ``lr`` are those of Adam (:class:`ImageOptimizer`). ``shift``, ``flip``, ``smallest_crop`` and
    ``crop_steps`` augment the images in each step (:class:`StepAugmentation`). ``natural_start`` starts from
    :func:`natural_noise`, otherwise from white noise. ``statistics``, ``label``, ``total_variation`` and ``norm`` are
    the weights of the objective's terms. ``compile`` saves time on a CPU from about a thousand images on.

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
        self._optimize = ImageOptimizer(steps=steps, lr=lr)
        self._augmentation = StepAugmentation(
            shift=shift, flip=flip, smallest_crop=smallest_crop, crop_steps=crop_steps
        )
        self._statistics, self._label = statistics, label
        self._total_variation, self._norm = total_variation, norm
        self._natural_start = natural_start
        self._compile = compile
        self._frozen: FrozenModels | None = None

    def check(self, models: Sequence[nn.Module]) -> None:
        for model in models:
            statistics_layers(model)

    def learn(
        self, models: Sequence[nn.Module], info: DataInfo, *, seed: int, folder: Path, device: torch.device
    ) -> None:
        """Does nothing: batches have nothing in common."""

    def make(
        self, models: Sequence[nn.Module], info: DataInfo, *, number: int, seed: int, device: torch.device
    ) -> Made:
        frozen = self._frozen = FrozenModels.of(models, self._frozen, info=info, device=device, compile=self._compile)
        labels = balanced_labels(info, batch_size=self.batch_size, number=number, device=device)
        begin = natural_noise if self._natural_start else white_noise
        start = begin(info, batch_size=self.batch_size, number=number, seed=seed, device=device)
        start = start.contiguous(memory_format=frozen.images_format)

        def objective(x: Tensor) -> Tensor:
            told = [
                self._statistics * a.statistics + self._label * F.cross_entropy(a.logits, labels) for a in frozen(x)
            ]
            return torch.stack(told).mean() + self._total_variation * total_variation(x) + self._norm * squared_norm(x)

        images = self._optimize(start, objective, self._augmentation, info, seed=seed, number=number)
        pixels = to_pixels(images, info)
        metrics = image_metrics(
            frozen, info, self._augmentation, pixels=pixels, labels=labels, seed=seed, number=number
        )
        return Made(pixels, labels.cpu(), metrics)
