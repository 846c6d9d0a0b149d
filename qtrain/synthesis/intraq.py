"""IntraQ: images of one class that differ from one another.

IntraQ (Zhong et al. 2022, arXiv 2111.09136) finds that images of one class all look alike if they are made from
batch norm's statistics and hard labels. It adds three things against this: local object reinforcement (crops at random
scales, :class:`StepAugmentation`), a marginal distance (:func:`marginal_distance`), and soft labels
(:func:`soft_inception`). The objective is

    statistics * D(x) + label * soft_inception + distance * marginal_distance

Unlike in the paper, the center of a class is that of its images in the same batch, not of all batches before. So a
batch is a function of its number.
"""

from collections.abc import Sequence
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtrain.functional import random
from qtrain.spec import DataInfo
from qtrain.synthesis.base import Made, Synthesis
from qtrain.synthesis.init_noise import balanced_labels
from qtrain.synthesis.model_outputs import ModelOutput
from qtrain.synthesis.optimized_batch import OptimizedBatch
from qtrain.synthesis.priors import total_variation
from qtrain.synthesis.statistics import statistics_layers
from qtrain.utils.checks import check_range


def soft_inception(logits: Tensor, labels: Tensor, wanted: Tensor) -> Tensor:
    """``mean_n (softmax(logits_n)[y_n] - wanted_n)^2``, 0-dim: images are not driven to certainty.

    ``logits`` (N, K), ``labels`` (N,) int64, ``wanted`` (N,) probabilities a little below 1.
    """
    probability = logits.float().softmax(dim=1).gather(1, labels[:, None])[:, 0]
    return (probability - wanted).square().mean()


def marginal_distance(features: Tensor, labels: Tensor, *, nearest: float, farthest: float) -> Tensor:
    """How far images are outside of the ring around their class's center, 0-dim.

    This is the mean of ``max(nearest - d_n, 0) + max(d_n - farthest, 0)`` with ``d_n = 1 - cos(features_n, center)``,
    where ``center`` is the mean of the features of all images with that label. An image that is alone in its class does
    not count. ``features`` (N, D), ``labels`` (N,) int64.
    """
    same = (labels[:, None] == labels[None, :]).to(features.dtype)
    count = same.sum(dim=1)
    center = (same @ features.detach()) / count[:, None]
    distance = 1 - F.cosine_similarity(features, center, dim=1)
    outside = (nearest - distance).clamp(min=0) + (distance - farthest).clamp(min=0)
    counts = (count > 1).to(features.dtype)
    return (outside * counts).sum() / counts.sum().clamp(min=1)


@final
class IntraQ(Synthesis):
    """Batches from batch norm's statistics whose images differ within each class; see the module for the objective.

    ``smallest_target``: the wanted probability of the label is drawn for each image, uniformly between this and 1.
    ``nearest`` and ``farthest`` bound the cosine distance to the class's center. ``images_per_class`` images in a row
    have the same class, so that images of one class meet in a batch even if there are more classes than images. The
    other options are those of :class:`~qtrain.synthesis.bn_statistics.BNStatistics`.
    """

    def __init__(
        self,
        *,
        batch_size: int = 128,
        steps: int = 80,
        lr: float = 0.2,
        statistics: float = 1.0,
        label: float = 20.0,
        smallest_target: float = 0.95,
        distance: float = 5.0,
        nearest: float = 0.05,
        farthest: float = 0.8,
        images_per_class: int = 8,
        total_variation: float = 0.0,
        shift: int = 4,
        flip: bool = True,
        smallest_crop: float = 0.5,
        crop_steps: float = 0.5,
        natural_start: bool = True,
        compile: bool = False,
    ) -> None:
        check_range("IntraQ", "[1, inf)", batch_size=batch_size, images_per_class=images_per_class)
        check_range("IntraQ", "(0, 1]", smallest_target=smallest_target, hint="a probability")
        if not 0 <= nearest < farthest <= 2:
            raise ValueError(
                "IntraQ: cosine distances go from 0 to 2, and nearest must be below farthest; "
                f"got nearest={nearest} and farthest={farthest}"
            )
        check_range("IntraQ", "[0, inf)", statistics=statistics, label=label, distance=distance)
        check_range("IntraQ", "[0, inf)", total_variation=total_variation)
        self.batch_size = batch_size
        self._images_per_class = images_per_class
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
        self._statistics, self._label, self._distance = statistics, label, distance
        self._total_variation = total_variation
        self._smallest_target, self._nearest, self._farthest = smallest_target, nearest, farthest

    def check(self, models: Sequence[nn.Module]) -> None:
        for model in models:
            statistics_layers(model)

    def make(
        self, models: Sequence[nn.Module], info: DataInfo, *, number: int, seed: int, device: torch.device
    ) -> Made:
        run = self._images_per_class
        labels = balanced_labels(info, batch_size=self.batch_size, number=number, device=device, run=run)
        wanted = self._wanted(number=number, seed=seed).to(device)

        def objective(x: Tensor, outputs: Sequence[ModelOutput]) -> Tensor:
            told = [
                self._statistics * output.statistics
                + self._label * soft_inception(output.logits, labels, wanted)
                + self._distance
                * marginal_distance(output.features, labels, nearest=self._nearest, farthest=self._farthest)
                for output in outputs
            ]
            return torch.stack(told).mean() + self._total_variation * total_variation(x)

        return self._batch.make(models, info, objective, labels, number=number, seed=seed)

    def _wanted(self, *, number: int, seed: int) -> Tensor:
        """The wanted probability of each image's label, (N,), a function of the seed and the image's own number."""
        index = torch.arange(number * self.batch_size, (number + 1) * self.batch_size)
        share = random.uniform(seed=seed, epoch=1, index=index, stream=random.NOISE, count=1)[:, 0]
        return self._smallest_target + (1 - self._smallest_target) * share
