"""What all scores share: the interface, the model in full precision meanwhile, and results that survive a stop."""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from qtrain.convert.bank import ROLES, QuantizerBank
from qtrain.spec import NO_LABEL, Batch, Choice, Role, Scores
from qtrain.utils.eval_mode import evaluating
from qtrain.utils.json_lines import append_line, read_lines

Done = MutableMapping[str, list[float]]
"""Parts of a score that are computed already: what a part is called -> its numbers."""


class Score(ABC):
    """Base of all scores; subclasses are final, and their options are their constructor's.

    A score leaves the bank's quantizers as they were, and the model in its fixed bits.
    """

    @abstractmethod
    def __call__(self, bank: QuantizerBank, batches: Sequence[Batch], *, seed: int, done: Done | None = None) -> Scores:
        """The rise for each choice of ``bank``, of layers that are tied for the first one only.

        ``batches`` are calibration images with their labels, on the device of the model. Random choices are a function
        of ``seed`` and the numbers of the images. ``done`` gets every part as soon as it is computed, and what it holds
        already is not computed again; it must come from the same bank, batches, seed and score.
        """


@final
class DoneFile(MutableMapping[str, list[float]]):
    """Parts of a score in a file of JSON lines, each written at once. Half a line, of a killed run, is left out."""

    def __init__(self, path: Path) -> None:
        self.path = path
        rows, _ = read_lines(path, _part)
        self._parts = dict(rows)

    def __getitem__(self, name: str) -> list[float]:
        return self._parts[name]

    def __setitem__(self, name: str, numbers: list[float]) -> None:
        self._parts[name] = numbers
        append_line(self.path, {"part": name, "numbers": numbers})

    def __delitem__(self, name: str) -> None:
        raise TypeError("a part of a score is never taken back")

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


def part_of(done: Done | None, name: str, compute: Callable[[], list[float]]) -> list[float]:
    """The numbers of the part ``name``, computed only where ``done`` does not have them."""
    if done is None:
        return compute()
    if name not in done:
        done[name] = compute()
    return done[name]


def scores_of(values: Mapping[Choice, float], pairs: Mapping[tuple[Choice, Choice], float] | None = None) -> Scores:
    """``values`` of single choices, by layer and bits. Raises ``ValueError`` for one that is not finite."""
    sides: dict[Role, dict[str, dict[int, float]]] = {role: {} for role in ROLES}
    for choice, value in values.items():
        if not math.isfinite(value):
            raise ValueError(
                f"score: that of the {choice.role} of layer {choice.layer!r} at {choice.bits} bits is {value}; the "
                "model's output or its derivatives are not finite on these images"
            )
        sides[choice.role].setdefault(choice.layer, {})[choice.bits] = value
    for (left, right), value in (pairs or {}).items():
        if not math.isfinite(value):
            raise ValueError(f"score: that of {label_of(left)} beside {label_of(right)} is {value}")
    return Scores(sides["weight"], sides["input"], pairs or {})


@final
class Given(nn.Module):
    """Values in place of a weight's quantizer: what that gives, computed once, or a tensor to differentiate by."""

    enabled = True

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = values

    def forward(self, weight: Tensor) -> Tensor:
        return self.values


@contextmanager
def scoring(bank: QuantizerBank) -> Iterator[nn.Module]:
    """Inside, the model is in full precision, in eval mode, and no parameter of it has a gradient."""
    bank.put_([])
    learned = [parameter for parameter in bank.model.parameters() if parameter.requires_grad]
    try:
        with evaluating(bank.model), torch.compiler.set_stance("force_eager"):
            for parameter in learned:
                parameter.requires_grad_(False)
            yield bank.model
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)
        bank.use_({})


def chunks(batches: Sequence[Batch], size: int) -> Iterator[tuple[str, Batch]]:
    """``batches`` in parts of at most ``size`` images, each with a name of its own."""
    if not batches:
        raise ValueError("score: no images; set quantize.calibration_batches to 1 or more")
    for number, batch in enumerate(batches):
        for start in range(0, len(batch.image), size):
            yield f"{number}:{start}", Batch(*(part[start : start + size] for part in batch))


def check_labels(batches: Sequence[Batch]) -> None:
    """Raise ``ValueError`` where none of the images has a label, for a score that differentiates or measures a loss."""
    if batches and not any(batch.labeled for batch in batches):
        raise ValueError("this score needs labels, and data.labeled hides those of all images here; take score fisher")


def members(bank: QuantizerBank, choice: Choice) -> tuple[str, ...]:
    """The layers that ``choice`` quantizes: its own, and those that are tied to it and have such a width."""
    tied = bank.tied[choice.role].get(choice.layer, (choice.layer,))
    return tuple(name for name in tied if choice.bits in bank.quantizers[name].get(choice.role, {}))


def label_of(choice: Choice) -> str:
    """The name of a choice as a part of a score."""
    return f"{choice.layer} {choice.role} {choice.bits}"


def probabilities(target: Tensor, logits: Tensor) -> Tensor:
    """``target``, class indices (N,) or probabilities (N, K), as probabilities like ``logits`` (N, K).

    Raises ``ValueError`` for an image without a label.
    """
    if target.is_floating_point():
        return target.to(logits)
    if bool((target == NO_LABEL).any()):
        raise ValueError("this score needs the label of each image, and data.labeled hides some; take another score")
    return nn.functional.one_hot(target, logits.shape[1]).to(logits)


def _part(row: dict[str, Any]) -> tuple[str, list[float]]:
    name, numbers = row.get("part"), row.get("numbers")
    if not isinstance(name, str) or not isinstance(numbers, list):
        raise ValueError(f"a part of a score has a name and numbers, got {json.dumps(row)}")
    return name, [float(number) for number in numbers]
