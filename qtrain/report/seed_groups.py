"""Runs as the rows of a table: repeats with other seeds share a row, and everything else has its own.

A student of many bits is a row of each width.

A mean over seeds counts each seed once: several runs start from one full-precision network and from one calibrated
student, and each of them measures both again.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import NamedTuple

from qtrain.pipeline.summary import CALIBRATED, DISTILLED, FLOAT, WAYS, RunSummary
from qtrain.report.difference import Accuracy, Difference, difference
from qtrain.spec import FULL_PRECISION

SAME = 1e-4
"""Accuracies that differ by less, in points, are one measurement; results files round to six digits."""


class GroupKey(NamedTuple):
    """What the runs of one row have in common. ``name`` tells rows apart that are alike in all that tables show.

    ``settings`` is a hash of what tables do not show: the data, and of a trained student all but the seed.
    """

    dataset: str
    model: str
    quantizer: str
    bits: str
    way: str
    terms: str
    name: str
    settings: str | None = None


@dataclass(frozen=True)
class SeedGroup:
    """One row: means over the seeds of ``key``. ``top1`` in percent, ``std`` (sample standard deviation over seeds) in
    points, sizes in bytes; a metric that no run knows is NaN. ``product`` is weight bits times input bits. ``images``
    is the number of test images, ``None`` where it is not known. ``by_seed`` has the accuracy of each seed, and
    ``change`` is the difference to the full-precision network that the same seed started from.
    """

    key: GroupKey
    product: float
    seeds: int
    images: int | None
    by_seed: Mapping[int | None, Accuracy]
    top1: float
    std: float
    change: Difference
    size_bytes: float
    file_bytes: float
    compression: float
    effective_bits: float
    bops: float
    fp_bops: float

    @property
    def bops_saved(self) -> float:
        """How many times fewer bit operations than in full precision; NaN where that is not known."""
        return self.fp_bops / self.bops if self.bops else math.nan


class _Measured(NamedTuple):
    top1: float
    run: RunSummary
    right: str = ""


def seed_groups(summaries: Iterable[RunSummary]) -> list[SeedGroup]:
    """The rows: by data set and model, most bits first, each in the order of :data:`WAYS`."""
    groups: dict[GroupKey, list[_Measured]] = {}
    for summary in (one for run in summaries for one in run.by_width()):
        for key, found in _accuracies(summary):
            groups.setdefault(key, []).append(_Measured(found.top1, summary, found.right))
    for key, members in list(groups.items()):
        if not _are_repeats(key, members):  # they differ in something that the key does not hold
            del groups[key]
            for name, member in _named(key, members):
                groups.setdefault(key._replace(name=name), []).append(member)
    shown = Counter(key._replace(settings=None) for key in groups)
    named = {
        key if shown[key._replace(settings=None)] == 1 else key._replace(name=members[0].run.name or "?"): members
        for key, members in groups.items()
    }
    return sorted((_group(key, members) for key, members in named.items()), key=order)


def order(group: SeedGroup) -> tuple[str, str, float, str, str, int, str, str]:
    """What rows are sorted by."""
    key = group.key
    return key.dataset, key.model, -group.product, key.quantizer, key.bits, WAYS.index(key.way), key.terms, key.name


def _are_repeats(key: GroupKey, members: Sequence[_Measured]) -> bool:
    """Whether ``members`` differ in their seeds alone, as far as the key and their accuracies tell."""
    if key.way in (FLOAT, CALIBRATED):  # measured by each run that starts there
        return all(max(same) - min(same) < SAME for same in _by_seed(members).values())
    return len({member.run.seed for member in members}) == len(members)


def _named(key: GroupKey, members: Sequence[_Measured]) -> Iterator[tuple[str, _Measured]]:
    """``members`` with the name of their run; what several runs have measured alike, with that of the first."""
    first: dict[tuple[int | None, int], str] = {}
    for member in members:
        name = member.run.name or ""
        if key.way in (FLOAT, CALIBRATED):
            name = first.setdefault((member.run.seed, round(member.top1 / SAME)), name)
        yield name or ("?" if key.way not in (FLOAT, CALIBRATED) else ""), member


def _by_seed(members: Iterable[_Measured]) -> dict[int | None, list[float]]:
    found: dict[int | None, list[float]] = {}
    for member in members:
        found.setdefault(member.run.seed, []).append(member.top1)
    return found


def _mean_by_seed(members: Iterable[_Measured]) -> dict[int | None, Accuracy]:
    members = list(members)
    right = {member.run.seed: member.right for member in members}
    return {seed: Accuracy(fmean(same), right[seed]) for seed, same in _by_seed(members).items()}


def _accuracies(summary: RunSummary) -> Iterator[tuple[GroupKey, Accuracy]]:
    """The rows that one run adds to: its own, and those of the model that it started from."""
    terms = summary.distill if summary.way == DISTILLED and isinstance(summary.distill, str) else ""
    own = GroupKey(
        dataset=summary.dataset or "?",
        model=summary.model or "?",
        quantizer=summary.quantizer or "",
        bits=summary.bits,
        way=summary.way,
        terms="" if terms.lower() in ("true", "yes") else terms,
        name="",
        settings=summary.recipe_hash,
    )
    start = own._replace(terms="", settings=summary.data_hash)
    before = start._replace(quantizer="", bits=FLOAT, way=FLOAT)
    if summary.full_precision:
        own = before
    elif summary.fp_top1 is not None:
        yield before, Accuracy(summary.fp_top1, summary.fp_right or "")
    if summary.ptq_top1 is not None and not summary.full_precision:
        yield start._replace(way=CALIBRATED), Accuracy(summary.ptq_top1)
    if summary.top1 is not None:
        # What task=calibrate left is one of several ways to calibrate; what training began from is not.
        found = Accuracy(summary.top1, summary.right or "")
        yield own._replace(name=summary.name or "") if own.way == CALIBRATED else own, found


def _group(key: GroupKey, members: list[_Measured]) -> SeedGroup:
    by_seed = _mean_by_seed(members)
    accuracies = [found.top1 for found in by_seed.values()]
    summaries = [member.run for member in members]
    full = key.way == FLOAT
    known = [member for member in members if not full and member.run.fp_top1 is not None]
    start = _mean_by_seed(
        _Measured(run.fp_top1, run, run.fp_right or "") for _, run, _ in known if run.fp_top1 is not None
    )
    images = {run.test_images for run in summaries}
    tested = images.pop() if len(images) == 1 else None
    return SeedGroup(
        key=key,
        product=float(FULL_PRECISION**2) if full else _product(summaries[0]),
        # One network that several seeds start from is one measurement.
        seeds=1 if full and max(accuracies) - min(accuracies) < SAME else len(accuracies),
        images=tested,
        by_seed=by_seed,
        top1=fmean(accuracies),
        std=stdev(accuracies) if len(accuracies) > 1 else 0.0,
        change=difference(_mean_by_seed(known), start, images=tested),
        size_bytes=_mean(s.fp_size_bytes if full else s.size_bytes for s in summaries),
        file_bytes=_mean(s.file_bytes for s in summaries if s.full_precision or not full),
        compression=1.0 if full else _mean(s.compression for s in summaries),
        effective_bits=float(FULL_PRECISION) if full else _mean(s.effective_bits for s in summaries),
        bops=_mean(s.fp_bops if full else s.bops for s in summaries),
        fp_bops=_mean(s.fp_bops for s in summaries),
    )


def _mean(values: Iterable[float | None]) -> float:
    known = [value for value in values if value is not None]
    return fmean(known) if known else math.nan


def _product(summary: RunSummary) -> float:
    """Weight bits times input bits, so that W8A8 stands before W4A8 before W4A4; 0 where they are words."""
    product = 1.0
    for bits in (summary.w_bits, summary.a_bits):
        product *= bits if isinstance(bits, int | float) else 0
    return product
