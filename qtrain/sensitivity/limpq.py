"""The size of the steps that each width learns, as in LIMPQ."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import final

import torch
from torch import Tensor

from qtrain.convert.bank import QuantizerBank
from qtrain.functional.losses import hard_loss
from qtrain.functional.random import seed_of
from qtrain.quantizers.base import Quantizer
from qtrain.quantizers.hooks import EvenSteps
from qtrain.quantizers.wrappers.wrapper import innermost
from qtrain.sensitivity.base import Done, Score, check_labels, chunks, part_of, scores_of, scoring
from qtrain.spec import Batch, Choice, Role, Scores


@final
class Limpq(Score):
    """The mean learned step of each weight and input at each width: a layer that needs a large step suffers from it.

    LIMPQ trains the network and the steps of all widths together, each step of the optimizer with widths drawn anew,
    and takes the learned steps as importance (Tang et al. 2022, arXiv 2203.08368, §3.2). Here only the steps learn,
    for ``steps`` steps of Adam on ``chunk`` images each, by the cross-entropy; the network is frozen. So this is the
    cheap part of the method, and its steps are those that suit the weights as they are. ``rate`` is relative to the
    step that calibration found. ``input_factor`` multiplies the steps of inputs, whose unit is another than that of
    weights (``alpha`` of the paper's eq. 8, chosen by hand there); ``None`` makes the mean step of all inputs as large
    as that of all weights. The score has no unit of loss. The quantizers are restored afterwards.

    Raises ``ValueError`` where a quantizer learns no step.
    """

    def __init__(
        self, *, steps: int = 100, rate: float = 0.01, input_factor: float | None = None, chunk: int = 64
    ) -> None:
        if steps < 0 or not rate > 0 or not (input_factor is None or input_factor > 0):
            raise ValueError(
                f"Limpq: steps must be 0 or more, rate and input_factor above 0, got {steps}, {rate}, {input_factor}"
            )
        self.steps, self.rate, self.input_factor, self.chunk = steps, rate, input_factor, chunk

    def __call__(self, bank: QuantizerBank, batches: Sequence[Batch], *, seed: int, done: Done | None = None) -> Scores:
        check_labels(batches)
        quantizers = {c: bank.quantizers[c.layer][c.role][c.bits] for c in bank.choices()}
        for choice, quantizer in quantizers.items():
            core = innermost(quantizer)
            if not isinstance(core, EvenSteps) or not any(True for _ in core.parameters()):
                raise ValueError(
                    f"Limpq: {type(core).__name__}, of the {choice.role} of layer {choice.layer!r}, learns no step; "
                    "quantize with lsq or lsq_plus, or take score fisher"
                )

        def learned() -> list[float]:
            with scoring(bank), _restored(list(quantizers.values())):
                self._learn_(bank, [batch for _, batch in chunks(batches, self.chunk)], quantizers, seed)
                return [_step(quantizer) for quantizer in quantizers.values()]

        steps = part_of(done, "steps", learned)
        of_role: dict[Role, list[float]] = {"weight": [], "input": []}
        for choice, step in zip(quantizers, steps, strict=True):
            of_role[choice.role].append(step)
        alike = fmean(of_role["weight"] or [1.0]) / fmean(of_role["input"] or [1.0])
        factor: dict[Role, float] = {"weight": 1.0, "input": self.input_factor or alike}
        return scores_of({c: step * factor[c.role] for c, step in zip(quantizers, steps, strict=True)})

    def _learn_(
        self, bank: QuantizerBank, parts: Sequence[Batch], quantizers: dict[Choice, Quantizer], seed: int
    ) -> None:
        learning = [p for quantizer in quantizers.values() for p in quantizer.parameters()]
        groups = [{"params": [p], "lr": self.rate * float(p.detach().abs().mean())} for p in learning]
        adam = torch.optim.Adam(groups)
        slots: dict[tuple[str, Role], list[Choice]] = {}
        for choice in quantizers:
            slots.setdefault((choice.layer, choice.role), []).append(choice)
        for step in range(self.steps):
            draws = (seed_of(seed, step, place) for place in range(len(slots)))
            bank.put_(widths[draw % len(widths)] for widths, draw in zip(slots.values(), draws, strict=True))
            batch = parts[step % len(parts)]
            adam.zero_grad()
            with torch.enable_grad():
                hard_loss(bank.model(batch.image), batch.target).backward()
            adam.step()


def _step(quantizer: Quantizer) -> float:
    core = innermost(quantizer)
    assert isinstance(core, EvenSteps)
    return float(core.step().detach().abs().mean())


@contextmanager
def _restored(quantizers: Sequence[Quantizer]) -> Iterator[None]:
    """Afterwards the state of ``quantizers`` is as it was, and they have no gradients."""
    before: list[tuple[Tensor, Tensor]] = [
        (tensor, tensor.detach().clone()) for quantizer in quantizers for tensor in quantizer.state_dict().values()
    ]
    parameters = [p for quantizer in quantizers for p in quantizer.parameters()]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, old in before:
                tensor.copy_(old)
        for parameter in parameters:
            parameter.grad = None
