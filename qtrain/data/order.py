"""Which samples each batch holds: a function of (seed, epoch, position), sliced evenly over the ranks.

Both loaders take their indices from here, so that resident and streaming data, one process and eight, a run
from start to end and a resumed one all see the same samples in the same order.
"""

import torch
from torch import Tensor

from qtrain.functional import random


class BatchOrder:
    """The batches of each epoch over the sample numbers ``samples`` (n,) int64.

    ``batch_size`` is global: of each batch, rank ``r`` of ``world_size`` takes the ``r``-th contiguous slice.
    Training shuffles by (seed, epoch) and drops the last incomplete batch. Evaluation keeps the given order and
    every sample, in batches whose sizes differ by at most one, with an image for each rank: a small rest would leave
    some ranks with nothing.
    ``first_epoch`` is added to every epoch that is set: a later stage of a run goes on with fresh orders.
    ``labeled`` (D,) bool says which of all D samples keep their labels in these batches; ``None`` is all.
    """

    def __init__(
        self,
        samples: Tensor,
        *,
        seed: int,
        batch_size: int,
        train: bool,
        rank: int = 0,
        world_size: int = 1,
        first_epoch: int = 0,
        labeled: Tensor | None = None,
    ) -> None:
        if train and batch_size % world_size:
            raise ValueError(
                f"BatchOrder: batch_size is global and must divide evenly over the ranks, got {batch_size} for "
                f"{world_size}; use a multiple of {world_size}"
            )
        if train and len(samples) < batch_size:
            raise ValueError(
                f"BatchOrder: batch_size must be at most the number of training images, got {batch_size} for "
                f"{len(samples)}; lower data.batch_size, or raise data.max_train or data.labeled"
            )
        if not train and len(samples) < world_size:
            raise ValueError(
                f"BatchOrder: each of {world_size} ranks needs an image to evaluate, got {len(samples)} in all; "
                "raise data.max_test or data.val_fraction"
            )
        self.samples = samples
        self.seed = seed
        self.batch_size = batch_size
        self.train = train
        self.rank = rank
        self.world_size = world_size
        self.first_epoch = first_epoch
        self.epoch = first_epoch
        self.labeled = labeled

    def over(self, samples: Tensor) -> "BatchOrder":
        """The same batches of ``samples`` (n,) int64, which this order counts from 0."""
        return BatchOrder(
            samples[self.samples],
            seed=self.seed,
            batch_size=self.batch_size,
            train=self.train,
            rank=self.rank,
            world_size=self.world_size,
            first_epoch=self.first_epoch,
        )

    def __len__(self) -> int:
        """Batches in an epoch."""
        n = len(self.samples)
        # Of each batch that is evaluated, every rank has at least one image.
        return n // self.batch_size if self.train else min(-(-n // self.batch_size), n // self.world_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose batches come next (Lightning calls this on a loader's ``sampler``)."""
        self.epoch = self.first_epoch + epoch

    def batches(self, epoch: int, start: int = 0) -> list[Tensor]:
        """This rank's sample numbers, one (n,) int64 CPU tensor for each batch of ``epoch`` from ``start`` on."""
        n, count = len(self.samples), len(self)
        if self.train:
            samples = self.samples[random.permutation(seed=self.seed, epoch=epoch, n=n)]
            edges = [k * self.batch_size for k in range(count + 1)]
        else:
            samples = self.samples
            edges = [k * n // count for k in range(count + 1)]
        return [self._slice(samples[a:b]) for a, b in zip(edges[start:-1], edges[start + 1 :], strict=True)]

    def _slice(self, batch: Tensor) -> Tensor:
        n = len(batch)
        return batch[n * self.rank // self.world_size : n * (self.rank + 1) // self.world_size]


def choose(n: int, limit: int | None) -> Tensor:
    """``limit`` of the samples ``0..n-1`` (all without a limit) in rising order; the choice depends on ``n`` alone."""
    if limit is None or limit >= n:
        return torch.arange(n)
    return random.permutation(seed=0, epoch=1, n=n, stream=random.SPLIT)[:limit].sort().values


def labeled_samples(samples: Tensor, count: int, total: int) -> Tensor:
    """Which of ``total`` samples have labels, (total,) bool: ``count`` of ``samples`` (n,), chosen at random.

    The choice depends on ``n`` and ``count`` alone and not on a run's seed, as that of validation images.
    """
    labeled = torch.zeros(total, dtype=torch.bool)
    labeled[samples[choose(len(samples), count)]] = True
    return labeled


def split_train_val(samples: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Divide training samples (n,) into those to train on and those to validate on, both in the given order.

    The choice depends on ``n`` and ``fraction`` alone and not on a run's seed: a teacher and its student, or two
    seeds of one experiment, must not train on each other's validation images.
    """
    n = len(samples)
    order = random.permutation(seed=0, epoch=0, n=n, stream=random.SPLIT)
    held_out = round(n * fraction)
    return samples[order[held_out:].sort().values], samples[order[:held_out].sort().values]


def first_samples(samples: Tensor, *, seed: int, count: int) -> Tensor:
    """A random choice of ``count`` of ``samples`` (all of them where there are fewer), as calibration uses it."""
    order = random.permutation(seed=seed, epoch=0, n=len(samples), stream=random.CALIBRATION)
    return samples[order[:count]]
