"""What the gate found: the comparisons, each with its differences and with what breaks its bound."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from qtrain.deployment.parity.compare import Difference


@dataclass(frozen=True)
class Disagreement:
    """The image with the number ``image`` gets another class when the whole network runs; ``cause`` says why.

    ``explained`` tells whether a tie or a bias of the file lies behind it.
    """

    image: int
    cause: str
    explained: bool


@dataclass
class Tier:
    """One comparison with the simulation: ``layers`` each from given codes, and ``faults``, what breaks the bound.

    ``notes`` are what is known of the runtime beside that.

    ``predicted`` are the classes that the whole network gives, one for each image, in ``cpu_s`` seconds of processor
    time, those of all threads together. ``logits_off`` is how far logits are from the student's at most, computed from
    its own codes, as a share of the distance between its largest and its smallest.
    """

    name: str
    layers: dict[str, Difference] = field(default_factory=dict)
    predicted: list[int] = field(default_factory=list)
    cpu_s: float = 0.0
    logits_off: float = 0.0
    disagreeing: list[Disagreement] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, found: Difference) -> None:
        before = self.layers.get(found.layer)
        self.layers[found.layer] = found if before is None else before + found

    @property
    def first(self) -> Difference | None:
        """The first layer that differs."""
        return next((layer for layer in self.layers.values() if layer.differing), None)


@dataclass
class Verdict:
    """The comparisons on so many ``images``; printed, one line for each.

    ``top1`` are the accuracies in percent, of the student and in each runtime, on ``test_images``; empty where no
    labels are known.
    """

    tiers: list[Tier]
    images: int = 0
    top1: dict[str, float] = field(default_factory=dict)
    test_images: int = 0

    @property
    def passed(self) -> bool:
        return not any(tier.faults for tier in self.tiers)

    @property
    def faults(self) -> list[str]:
        """What breaks a bound, with the comparison in front."""
        return [f"{tier.name}: {fault}" for tier in self.tiers for fault in tier.faults]

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        for tier in self.tiers:
            layers = list(tier.layers.values())
            differing, elements = sum(one.differing for one in layers), sum(one.elements for one in layers)
            first = ""
            if tier.first is not None:
                steps = max(one.steps for one in layers)
                reach = f"by {'one step' if steps == 1 else f'up to {steps} steps'}"
                first = f" {reach}, the first in {tier.first.layer} ({tier.first.cause})"
            codes = f"{differing} of {elements} codes differ{first}" if layers else "as the student gives them"
            same = f"; {len(tier.disagreeing)} of {self.images} predictions differ" if layers else ""
            yield "; ".join(
                [f"{tier.name}: {'FAILED: ' + tier.faults[0] if tier.faults else codes}{same}", *tier.notes]
            )
        if self.top1:
            parts = ", ".join(f"{name} {number:.2f} %" for name, number in self.top1.items())
            yield f"top-1 on {self.test_images} images: {parts}"
