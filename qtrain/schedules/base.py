"""The schedule's interface: a pure function of progress, so that a resumed run needs no saved state."""

from abc import ABC, abstractmethod


class Schedule(ABC):
    """Maps progress, the share of optimizer steps done, in [0, 1], to a number."""

    @abstractmethod
    def __call__(self, progress: float) -> float:
        """The value at ``progress``."""


def check_fraction(owner: str, name: str, value: float) -> float:
    """``value`` if it lies in [0, 1]; otherwise an error that says whose it is."""
    if not 0 <= value <= 1:
        raise ValueError(f"{owner}: {name} is a share of the run and must be in [0, 1], got {value}")
    return value
