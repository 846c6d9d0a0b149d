"""The files of a generator in training: its latest state, and its parameters at several ages."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn, optim

from qtrain.utils.atomic_write import atomic_write

State = Mapping[str, Tensor]
"""A module's tensors by name."""


@final
class GeneratorCheckpoint:
    """``folder`` of a generator: ``learning.pt``, from which training continues, and ``<age>.pt`` for each age.

    ``identity`` is everything that determines the result; a folder with another identity is refused.
    """

    def __init__(self, *, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self.identity = {name: _plain(value) for name, value in identity.items()}

    def restore(self, generator: nn.Module, optimizer: optim.Optimizer) -> int:
        """Load the last saved state into both; returns the number of steps done by then, 0 if nothing was saved."""
        path = self.folder / "learning.pt"
        if not path.is_file():
            return 0
        saved = self._load(path, "identity", "generator", "optimizer", "step")
        known = saved["identity"]
        if changed := sorted(name for name in {*known, *self.identity} if known.get(name) != self.identity.get(name)):
            raise ValueError(
                f"generator: {self.folder} holds one that was learned with other {', '.join(changed)}; "
                "take another folder, or delete this one"
            )
        generator.load_state_dict(saved["generator"])
        optimizer.load_state_dict(saved["optimizer"])
        return int(saved["step"])

    def save(self, step: int, generator: nn.Module, optimizer: optim.Optimizer) -> None:
        """Save the state of the training after ``step`` steps."""
        state = {"generator": generator.state_dict(), "optimizer": optimizer.state_dict()}
        with atomic_write(self.folder / "learning.pt") as path:
            torch.save({"step": step, "identity": self.identity, **state}, path)

    def keep(self, age: int, generator: nn.Module) -> None:
        """Save the parameters of ``generator`` after ``age`` steps."""
        with atomic_write(self.folder / f"{age}.pt") as path:
            torch.save(generator.state_dict(), path)

    def kept(self, age: int) -> State:
        """The parameters that :meth:`keep` saved at ``age``, on the CPU."""
        path = self.folder / f"{age}.pt"
        if not path.is_file():
            raise ValueError(f"generator: {path} is missing, delete {self.folder} to learn anew")
        return self._load(path)

    def _load(self, path: Path, *names: str) -> dict[str, Any]:
        """The dict in ``path``, which has ``names``. Raises ``ValueError`` for a file that is damaged."""
        try:
            saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            for name in names:
                saved[name]
        except Exception as error:  # torch raises this or that
            raise ValueError(f"generator: {path} is damaged, delete {self.folder} to learn anew") from error
        return saved


def _plain(value: Any) -> str:
    """``value`` as text; for an object, its class and attributes."""
    return json.dumps(value, sort_keys=True, default=lambda thing: {type(thing).__name__: vars(thing)})
