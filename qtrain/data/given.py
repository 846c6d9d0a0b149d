"""Loaders of a user's own as training sees them: plain torch loaders of (image, label), made exactly resumable."""

from collections.abc import Iterator, Sized
from typing import Any, final

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from qtrain.data.fit_data import FitData
from qtrain.data.streaming_loader import seeded
from qtrain.functional.random import seed_of
from qtrain.spec import NO_LABEL, Batch, DataInfo

Pairs = DataLoader[Any]
"""A loader that yields (image, label): image (N, C, H, W) float, normalized; label (N,) int64."""


BATCHES = "a dataset needs a DataLoader, which makes batches, and images ToTensor and Normalize"


@final
class GivenLoader:
    """The batches of ``loader``, whose random numbers are a function of (seed, epoch, batch).

    Shuffling, and what a dataset draws from torch, numpy and ``random``, follow it, so that a run that was killed sees
    the same batches when it goes on: those that it had are drawn again and passed over. With worker processes the
    workers' seeds follow from the epoch.
    """

    def __init__(
        self, loader: Pairs, *, num_classes: int, seed: int, first_epoch: int = 0, training: bool = True
    ) -> None:
        self._loader, self._num_classes, self._seed, self._training = loader, num_classes, seed, training
        self._first_epoch = first_epoch
        self._next_epoch = self._epoch = first_epoch
        self._handed_out = 0
        self._resuming = False

    @property
    def sampler(self) -> "GivenLoader":
        """What Lightning calls ``set_epoch`` on."""
        return self

    batch_sampler = None

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration goes through."""
        self._next_epoch = self._first_epoch + epoch

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        epoch = self._next_epoch
        passed = self._handed_out if self._resuming and self._epoch == epoch else 0
        self._resuming = False
        self._epoch, self._handed_out = epoch, passed
        for number, batch in enumerate(self._drawn(epoch)):
            if number >= passed:
                self._handed_out += 1
                yield batch

    def _drawn(self, epoch: int) -> Iterator[Batch]:
        generators = (getattr(one, "generator", None) for one in (self._loader, getattr(self._loader, "sampler", None)))
        with seeded(seed_of(self._seed, epoch)):
            for generator in generators:
                if isinstance(generator, torch.Generator):
                    generator.manual_seed(seed_of(self._seed, epoch))
            batches = iter(self._loader)
        first = 0
        for number in range(len(self._loader)):
            with seeded(seed_of(self._seed, epoch, number)):
                batch = next(batches, None)
            if batch is None:
                return
            made = as_batch(batch, first, self._num_classes, training=self._training)
            first += len(made.target)
            yield made

    def state_dict(self) -> dict[str, int]:
        """Where the loader is, and what that depends on."""
        return {"epoch": self._epoch, "batches": self._handed_out, "seed": self._seed, "length": len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the batch that was handed out last. Raises ``ValueError`` for another loader's state."""
        for name, own in (("seed", self._seed), ("length", len(self))):
            if state.get(name) != own:
                raise ValueError(
                    f"GivenLoader: cannot resume, {name} was {state.get(name)} when the checkpoint was written and is "
                    f"{own} now; restore it, or give another folder"
                )
        self._epoch, self._handed_out, self._resuming = state["epoch"], state["batches"], True


def as_batch(given: object, first: int, num_classes: int, *, training: bool) -> Batch:
    """A loader's (image, label), or a batch that has more, as a :class:`Batch` whose samples count from ``first``.

    For ``training`` labels may also be probabilities (N, K), and :data:`NO_LABEL`. Raises ``ValueError`` for anything
    else, and for labels that number no class; those on a GPU are not looked at.
    """
    if isinstance(given, Batch):
        return given
    if not isinstance(given, tuple | list) or len(given) < 2 or not all(isinstance(x, Tensor) for x in given[:2]):
        kind = (
            f"({', '.join(type(x).__name__ for x in given)})"
            if isinstance(given, tuple | list)
            else type(given).__name__
        )
        raise ValueError(f"the loader must yield (image, label), two tensors, got {kind}; {BATCHES}")
    image, target = given[0], given[1]
    numbers = target.ndim == 1 and not target.is_floating_point()
    shares = training and target.is_floating_point() and target.shape[1:] == (num_classes,)
    if not image.is_floating_point() or image.ndim < 2 or not (numbers or shares) or len(image) != len(target):
        raise ValueError(
            "the loader must yield float images (N, C, H, W) and labels (N,) that number classes, got "
            f"{image.dtype} {tuple(image.shape)} and {target.dtype} {tuple(target.shape)}; {BATCHES}"
        )
    if numbers and target.device.type == "cpu":
        known = target[target != NO_LABEL] if training else target
        if len(known) and not 0 <= int(known.min()) <= int(known.max()) < num_classes:
            raise ValueError(
                f"the loader gives labels from {int(known.min())} to {int(known.max())}, and the student has "
                f"{num_classes} classes, 0 to {num_classes - 1}"
            )
    # Losses know class numbers of 64 bits alone.
    return Batch(image, target.long() if numbers else target, torch.arange(first, first + len(target)))


def _length(loader: object) -> int:
    """How many batches there are; 0 for a loader that does not know, as one over a stream."""
    try:
        return len(loader) if isinstance(loader, Sized) else 0
    except TypeError:
        return 0


class GivenLoaders(FitData):
    """A training loader and perhaps one for validation, with the facts that training needs to know.

    ``num_classes`` are the student's logits. ``example`` is the first image, ``examples`` are that and the first
    one for validation. Raises ``ValueError`` where the first
    batch is not (image, label).
    """

    def __init__(self, train: Pairs, validation: Pairs | None, *, num_classes: int, seed: int) -> None:
        super().__init__()
        if not _length(train):
            raise ValueError("the training loader has no batches, or does not know how many; give one with a length")
        self._train, self._validation, self._seed = train, validation, seed
        self._first_epoch = 0
        with seeded(seed):
            image = as_batch(next(iter(train)), 0, num_classes, training=True).image
            if validation is not None:
                if (one := next(iter(validation), None)) is None:
                    raise ValueError("the loader for validation has no batches; leave it out, or give one that has")
                one_image = as_batch(one, 0, num_classes, training=False).image
        self.example = image[:1]
        self.examples = (self.example,) if validation is None else (self.example, one_image[:1])
        channels, size = (image.shape[1], image.shape[-1]) if image.ndim == 4 else (1, image.shape[-1])
        self._info = DataInfo(
            name="given",
            num_classes=num_classes,
            in_channels=channels,
            image_size=size,
            mean=(0.0,) * channels,
            std=(1.0,) * channels,
            train_size=_size(train),
            val_size=0 if validation is None else _size(validation),
            test_size=0,
            kind="streaming",
        )

    @property
    def info(self) -> DataInfo:
        return self._info

    def start_at(self, epoch: int) -> None:
        self._first_epoch = epoch

    def train_dataloader(self) -> GivenLoader:
        return GivenLoader(
            self._train, num_classes=self._info.num_classes, seed=self._seed, first_epoch=self._first_epoch
        )

    def val_dataloader(self) -> GivenLoader | list[GivenLoader]:
        return (
            []
            if self._validation is None
            else GivenLoader(self._validation, num_classes=self._info.num_classes, seed=self._seed)
        )


def _size(loader: Pairs) -> int:
    dataset = getattr(loader, "dataset", None)
    return len(dataset) if isinstance(dataset, Sized) else len(loader)
