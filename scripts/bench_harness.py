"""How all benchmarks of steps measure: cases in one process, in turns, with ratios of times of the same round.

Whatever else slows the machine slows all cases alike. So times are medians over the rounds with their quartiles, and a
ratio is the median of the rounds' own ratios. What a forward saves for its backward is counted exactly: activations,
without parameters and the batch. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from qtrain.utils.processor import processor_flags
from qtrain.utils.saved_tensors import SavedTensors

FULL = "full precision"
"""The case that saved bytes are compared with."""

FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp")
"""What decides how fast a processor computes, as far as it has them."""


@dataclass(frozen=True)
class Work:
    """What a case does once, and the tensors that it has in memory anyway: parameters, buffers, the batch."""

    run: Callable[[], None]
    known: Sequence[Tensor]


@dataclass
class Measured:
    """Milliseconds of one step, round by round; rounds of different cases with one number belong together.

    ``bases`` are the cases whose summed time is the 1 of its ratio, in its own mode or as ``base_compiled`` says.
    ``saved`` are the bytes that one forward keeps for its backward. ``first_s`` are the seconds of the first step, in
    which compiled code is made; it is found on disk if it was made before, unless caches are off
    (``TORCHINDUCTOR_FORCE_DISABLE_CACHES=1``).
    """

    case: str
    compiled: bool
    bases: tuple[str, ...] = ()
    base_compiled: bool | None = None
    ms: list[float] = field(default_factory=list)
    saved: int = 0
    first_s: float = 0.0

    @property
    def mode(self) -> str:
        return mode_name(self.compiled)


def mode_name(compiled: bool) -> str:
    return "compiled" if compiled else "eager"


def measure(
    cases: Sequence[tuple[Measured, Work]], *, device: torch.device, rounds: int, steps: int, warmup: int
) -> None:
    """Add ``rounds`` times of each case, in milliseconds a step, each the mean over ``steps`` steps in a row.

    Before, the first step is timed by itself, ``warmup`` steps follow, and one more tells what it saves.
    """
    for measured, work in cases:
        measured.first_s = measured.first_s or seconds(work.run, device)
        for _ in range(warmup):
            work.run()
        measured.saved = saved_bytes(work)
    for number in range(rounds):
        # To and fro, so that a machine that grows warmer favors no case.
        for measured, work in cases if number % 2 == 0 else reversed(cases):
            run = work.run
            run()  # brings the case's own memory into the caches
            measured.ms.append(1e3 * seconds(run, device, steps) / steps)


def seconds(run: Callable[[], None], device: torch.device, steps: int = 1) -> float:
    """How long ``steps`` runs in a row take."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(steps):
        run()
    synchronize(device)
    return time.perf_counter() - start


def saved_bytes(work: Work) -> int:
    """What one step saves between its forward and its backward."""
    with SavedTensors(work.known) as saved:
        work.run()
    return saved.bytes


def synchronize(device: torch.device) -> None:
    """Wait until ``device`` has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratios(measured: Measured, others: Sequence[Measured]) -> list[float]:
    """This case's time in units of its bases', round by round; nothing where it has none."""
    mode = measured.compiled if measured.base_compiled is None else measured.base_compiled
    bases = [o for o in others if o.compiled == mode and o.case in measured.bases]
    sums = [sum(times) for times in zip(*(base.ms for base in bases), strict=True)]
    return [own / base for own, base in zip(measured.ms, sums, strict=True)] if bases else []


def ratio(measured: Measured, others: Sequence[Measured]) -> float | None:
    """The median of :func:`ratios`; ``None`` where there are none."""
    found = ratios(measured, others)
    return statistics.median(found) if found else None


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and the third quartile; of a single value it is both."""
    if len(values) < 2:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def first_ratio(measured: Measured, others: Sequence[Measured]) -> float | None:
    """The first step in units of full precision's in the same mode: what compiling costs, if nothing was cached."""
    full = [one.first_s for one in others if one.compiled == measured.compiled and one.case == FULL]
    return measured.first_s / full[0] if full and full[0] and measured.case != FULL else None


def saved_ratio(measured: Measured, others: Sequence[Measured]) -> float | None:
    """The bytes that this case saves in units of what full precision saves in the same mode."""
    full = [one.saved for one in others if one.compiled == measured.compiled and one.case == FULL]
    return measured.saved / full[0] if full and full[0] and measured.saved and measured.case != FULL else None


def table(results: Sequence[Measured]) -> str:
    """One line for each case and mode: median and quartiles of the time, and the ratio with what it refers to."""
    width = max(len(one.case) for one in results) + 2
    head = f"{'case':<{width}}{'mode':<10}{'ms/step':>9}{'1st qu.':>9}{'3rd qu.':>9}"
    lines = [f"{head}{'saved MB':>10}{'first s':>9}{'ratio':>8}"]
    for one in results:
        first, third = quartiles(one.ms)
        line = f"{one.case:<{width}}{one.mode:<10}{statistics.median(one.ms):9.2f}{first:9.2f}{third:9.2f}"
        line += f"{one.saved / 1e6:10.1f}{one.first_s:9.2f}"
        if (share := ratio(one, results)) is not None:
            other = "" if one.base_compiled in (None, one.compiled) else f", {mode_name(bool(one.base_compiled))}"
            line += f"{share:8.3f} of {' + '.join(one.bases)}{other}"
        if (memory := saved_ratio(one, results)) is not None:
            line += f", saves {memory:.3f} of {FULL}"
        lines.append(line)
    return "\n".join(lines)


def columns(measured: Measured, others: Sequence[Measured]) -> dict[str, object]:
    """What a row of results has of one case: times, ratio and their quartiles, and what it saves."""
    low, high = quartiles(measured.ms)
    found = ratios(measured, others)
    return {
        "case": measured.case,
        "mode": measured.mode,
        "step_ms": statistics.median(measured.ms),
        "step_ms_quartiles": f"{low:.4g} {high:.4g}",
        "ratio": ratio(measured, others),
        "ratio_quartiles": "{:.4f} {:.4f}".format(*quartiles(found)) if found else None,
        "saved_bytes": measured.saved or None,
        "saved_ratio": saved_ratio(measured, others),
        "first_s": measured.first_s,
        "first_ratio": first_ratio(measured, others),
    }


def parse(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, *, over: str, **defaults: int
) -> argparse.Namespace:
    """The options of ``parser`` and those that all benchmarks of steps have; torch gets the threads that are asked for.

    ``overrides`` are laid over the experiment ``over``. ``defaults`` are a benchmark's own of the common options.
    """
    _add_options(parser)
    parser.set_defaults(**defaults)
    parser.add_argument("overrides", nargs="*", help=f"key=value, laid over +experiment={over}")
    options = parser.parse_intermixed_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    return options


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=_count, default=128, help="images in a step (%(default)s)")
    parser.add_argument(
        "--size", type=_count, default=32, help="height and width of the images in pixels (%(default)s)"
    )
    parser.add_argument("--rounds", type=_count, default=9, help="times that each case has its turn (%(default)s)")
    parser.add_argument("--steps", type=_count, default=10, help="steps in a turn (%(default)s)")
    parser.add_argument("--threads", type=_count, help="threads of torch; default: as torch chooses")
    parser.add_argument("--results", type=Path, help="CSV file that gets a row for each case and mode")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def conditions(*, batch: int, size: int, bf16: bool, rounds: int, steps: int) -> str:
    """What the times depend on beside the machine's name: the notes of a row."""
    flags = " ".join(flag for flag in FLAGS if flag in processor_flags())
    return (
        f"batch={batch} size={size} {'bf16' if bf16 else 'float32'} channels_last "
        f"rounds={rounds} steps={steps} threads={torch.get_num_threads()} {flags}"
    ).rstrip()
