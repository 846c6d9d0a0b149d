"""The data module that every dataset derives from: splits, loaders, calibration images.

A dataset's file says where its images are and how they are decoded; which images are trained on, validated
on and tested on, in which order and by which rank, is decided here, once.

The classes are keyword-only dataclasses: an option is declared in one place and every dataset below has it in its
constructor's signature, which is the schema of its YAML. (Annotations are real types here, not strings, so that
they can be resolved from a subclass in another file.)
"""

import copy
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from hashlib import sha256
from typing import Any

from torch import Tensor

from qtrain.data.fit_data import FitData
from qtrain.data.loader import EpochLoader
from qtrain.data.order import BatchOrder, choose, first_samples, labeled_samples, split_train_val
from qtrain.spec import Batch, DataInfo
from qtrain.utils.checks import check_range

log = logging.getLogger(__name__)

NOT_IN_IMAGES = (
    "batch_size", "eval_batch_size", "val_fraction", "max_train", "max_test", "labeled", "mean", "std",
    "device", "channels_last", "workers", "cache_dir", "test", "check", "on_error",
)  # fmt: skip
"""Options that change which images are seen, when or where, but no image itself; ``info`` has mean and std."""


@dataclass(kw_only=True, eq=False, repr=False)
class VisionData(FitData, ABC):
    """Images and class labels with a training set and a test set; ``name`` is what reports call it.

    ``batch_size`` is global: each rank takes its slice. ``val_fraction`` of the training images is held out for
    validation; the test images are never used for it. ``mean`` and ``std`` are per channel, in units of pixel / 255;
    None leaves them to the dataset. ``mixup`` and ``cutmix`` are alphas, 0 for off. ``max_train`` and ``max_test``
    keep so many images, for quick runs: always the same ones, chosen at random, since folders are sorted by class.
    ``labeled`` of the training images keep their labels, likewise; only a teacher teaches on the others. Images for
    validation and for the test keep theirs. ``channels_last`` is the memory format of batches that loaders give which
    are made from now on.
    """

    name: str
    seed: int = 0
    batch_size: int = 128
    eval_batch_size: int = 128
    val_fraction: float = 0.0
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    max_train: int | None = None
    max_test: int | None = None
    labeled: int | None = None
    channels_last: bool = True

    def __post_init__(self) -> None:
        super().__init__()
        self._info: DataInfo | None = None
        self._first_epoch = 0
        self._test_only = False
        self._labels_only = False
        self._content_hash: str | None = None
        owner = type(self).__name__
        check_range(owner, "[1, inf)", batch_size=self.batch_size, eval_batch_size=self.eval_batch_size)
        check_range(owner, "[1, inf)", max_train=self.max_train, max_test=self.max_test, labeled=self.labeled)
        check_range(owner, "[0, 1)", val_fraction=self.val_fraction, hint="0 is no validation")
        check_range(owner, "[0, inf)", mixup=self.mixup, cutmix=self.cutmix, hint="0 turns it off")
        if self.labeled is not None and (self.mixup or self.cutmix):
            raise ValueError(
                f"{owner}: labeled={self.labeled} leaves images without labels, which cannot be mixed; "
                "set mixup and cutmix to 0"
            )
        if (self.mean is None) != (self.std is None):
            raise ValueError(f"{owner}: mean and std belong together, got mean={self.mean} and std={self.std}")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"{owner}: std must be above 0, got {list(self.std)}")

    @abstractmethod
    def _read(self) -> None:
        """Read what ``info`` and the loaders need; called once in each process, first on each node's rank 0.

        With ``_test_only`` no training image is opened or looked for, and the training set is empty.
        """

    @abstractmethod
    def _describe(self, train_size: int, val_size: int, test_size: int) -> DataInfo:
        """The dataset's facts, after ``_read``; the sizes are those of the splits in use."""

    @abstractmethod
    def _sizes(self) -> tuple[int, int]:
        """How many training and test images there are in all, after ``_read``."""

    @abstractmethod
    def _loader(self, order: BatchOrder, *, test_images: bool) -> EpochLoader:
        """A loader of the test images or of the training images; it augments where ``order.train``."""

    @abstractmethod
    def _content(self) -> str:
        """What :meth:`content` gives, of images as they are read."""

    def content(self) -> str:
        """A hash of the training images and their labels, or of as much of them as can be read in a few seconds."""
        if self._content_hash is None:
            self._content_hash = self._content()
        return self._content_hash

    @property
    def info(self) -> DataInfo:
        """Facts of the dataset, known after ``setup``."""
        if self._info is None:
            raise RuntimeError(f"{type(self).__name__}: info is known after setup(); call it first")
        return self._info

    def identity(self) -> dict[str, Any]:
        """What the training image of a given (epoch, sample) depends on, as plain values; known after ``setup``.

        Mixed images depend on their neighbors in the epoch's order, and so on all samples in use; not on the batch
        size, since pairs never cross its edges.
        """
        info = self.info
        options = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in NOT_IN_IMAGES}
        facts = {"mean": list(info.mean), "std": list(info.std), "image_size": info.image_size}
        samples = sha256(self._train_samples.numpy().tobytes()).hexdigest() if self.mixup or self.cutmix else None
        return {**options, **facts, "samples": samples, "content": self.content()}

    def test_only(self) -> None:
        """Do not read the training images, which may be absent or forbidden. Must be called before ``setup``."""
        assert self._info is None, "test_only() comes before setup()"
        self._test_only = True

    def train_on_labels_only(self, yes: bool) -> None:
        """Whether training loaders made from now on leave out images without a label, where nobody teaches on them."""
        self._labels_only = yes

    def start_at(self, epoch: int) -> None:
        """Let the next fit's first epoch be ``epoch`` of the run, with its order and augmentation."""
        self._first_epoch = epoch

    def prepare_data(self) -> None:
        """Download and decode on one process of each node, so that the others find the cache."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Read the dataset and split it; later calls change nothing."""
        if self._info is not None:
            return
        self._read()
        train_size, test_size = self._sizes()
        self._test_samples = choose(test_size, self.max_test)
        self._train_samples, self._val_samples = split_train_val(choose(train_size, self.max_train), self.val_fraction)
        self._labeled = None
        if self.labeled is not None:
            self._labeled = labeled_samples(self._train_samples, self.labeled, train_size)
        self._info = info = self._describe(len(self._train_samples), len(self._val_samples), len(self._test_samples))
        self._check(info)
        log.info(
            "%s (%s): %d training, %d validation, %d test images of %dx%d, %d classes",
            info.name, info.kind, info.train_size, info.val_size, info.test_size,
            info.image_size, info.image_size, info.num_classes,
        )  # fmt: skip
        if self._labeled is not None:
            log.info("%s: %d training images keep their labels", info.name, int(self._labeled.sum()))

    def with_all_labels(self) -> "VisionData":
        """The same images, of which all have their labels; after ``setup``."""
        other = copy.copy(self)
        other._labeled = None
        return other

    def train_dataloader(self) -> EpochLoader:
        """Shuffled, augmented, complete batches of this rank's slices."""
        self._require_train("training")
        samples = self._train_samples
        if self._labels_only and self._labeled is not None:
            samples = samples[self._labeled[samples]]
        order = self._order(samples, train=True)
        if (self.mixup or self.cutmix) and (self.batch_size // order.world_size) % 2:
            raise ValueError(
                f"{type(self).__name__}: mixup and cutmix need an even batch on each rank, got batch_size "
                f"{self.batch_size} on {order.world_size} rank(s); use a multiple of {2 * order.world_size}"
            )
        return self._loader(order, test_images=False)

    def val_dataloader(self) -> EpochLoader | list[EpochLoader]:
        """The held-out training images, without augmentation; an empty list where ``val_fraction`` is 0."""
        if not len(self._val_samples):
            return []
        return self._loader(self._order(self._val_samples, train=False), test_images=False)

    def test_dataloader(self) -> EpochLoader:
        """The test images, without augmentation."""
        if not len(self._test_samples):
            raise ValueError(f"{self.name}: there are no test images; set fit.final_test=false to run without them")
        return self._loader(self._order(self._test_samples, train=False), test_images=True)

    def test_loader(self, order: BatchOrder) -> EpochLoader:
        """As :meth:`test_dataloader` in the batches of ``order``, whose samples count those in use from 0."""
        return self._loader(order.over(self._test_samples), test_images=True)

    def calibration_batches(self, count: int) -> list[Batch]:
        """``count`` batches of training images without augmentation, a function of the seed; the same on each rank.

        They lie on the trainer's device if there is one. There are fewer if the training images run out.
        """
        if count < 1:
            raise ValueError(f"{type(self).__name__}: calibration needs at least 1 batch, got {count}")
        self.setup()
        self._require_train("calibration")
        wanted = count * self.batch_size
        samples = first_samples(self._train_samples, seed=self.seed, count=wanted)
        if len(samples) < wanted:
            log.info("calibration uses all %d training images; %d were asked for", len(samples), wanted)
        order = BatchOrder(samples, seed=self.seed, batch_size=self.batch_size, train=False, labeled=self._labeled)
        batches = list(self._loader(order, test_images=False))
        if self.trainer is None:
            return batches
        device = self.trainer.strategy.root_device
        return [Batch(*(part.to(device) for part in batch)) for batch in batches]

    def _order(self, samples: Tensor, *, train: bool) -> BatchOrder:
        trainer = self.trainer
        return BatchOrder(
            samples,
            seed=self.seed,
            batch_size=self.batch_size if train else self.eval_batch_size,
            train=train,
            rank=trainer.global_rank if trainer else 0,
            world_size=trainer.world_size if trainer else 1,
            first_epoch=self._first_epoch if train else 0,
            labeled=self._labeled if train else None,
        )

    def _require_train(self, purpose: str) -> None:
        if not len(self._train_samples):
            raise ValueError(
                f"{self.name}: {purpose} needs training images and there are none; give them, or synthesize "
                "images from a model: data=synthetic"
            )

    def _check(self, info: DataInfo) -> None:
        if not len(info.mean) == len(info.std) == info.in_channels:
            raise ValueError(
                f"{type(self).__name__}: mean and std need one value for each of {info.in_channels} channel(s), "
                f"got {list(info.mean)} and {list(info.std)}"
            )
        if self.val_fraction and not info.val_size and not self._test_only:
            raise ValueError(
                f"{type(self).__name__}: val_fraction {self.val_fraction} of {info.train_size} images is less than one "
                "image; raise it"
            )
