"""What a fit asks of its data."""

from abc import ABC, abstractmethod

import pytorch_lightning as pl

from qtrain.spec import DataInfo


class FitData(pl.LightningDataModule, ABC):
    """Loaders of training and validation batches, and the facts of the images.

    ``channels_last`` says whether batches have this memory format; models that they go into should have it then.
    """

    channels_last: bool = False

    @property
    @abstractmethod
    def info(self) -> DataInfo:
        """Facts of the images."""

    @abstractmethod
    def start_at(self, epoch: int) -> None:
        """Let the next fit's first epoch be ``epoch`` of the run."""
