"""What a teacher adds: distilled students against those that are alike but trained without one.

``recorded.csv`` beside this file has what the experiments of ``results/`` reached over many seeds.
``scripts/render_results.py`` writes it, so that an installed package can show it, and no figure is typed.
"""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean, stdev

from qtrain.pipeline.summary import DISTILLED, TRAINED, RunSummary
from qtrain.report.difference import Difference, difference
from qtrain.report.seed_groups import SeedGroup, seed_groups

RECORDED = Path(__file__).with_name("recorded.csv")


@dataclass(frozen=True)
class Recorded:
    """A gain over several seeds, as text: ``error`` is its standard error, and ``seed_error`` the part by seeds.

    Means and standard deviations (``_std``) over seeds are of the students without and with teacher.
    """

    experiment: str
    dataset: str
    model: str
    bits: str
    test_images: str
    seeds: str
    trained: str
    trained_std: str
    distilled: str
    distilled_std: str
    gain: str
    error: str
    seed_error: str
    commit: str


@dataclass(frozen=True)
class TeacherGain:
    """``difference`` of the accuracies of ``distilled`` and ``trained``, which are alike in data, model and bits."""

    trained: SeedGroup
    distilled: SeedGroup

    @property
    def difference(self) -> Difference:
        return difference(self.distilled.by_seed, self.trained.by_seed, images=self.distilled.images)


def teacher_gains(groups: Sequence[SeedGroup]) -> list[TeacherGain]:
    """The pairs of rows that differ in the teacher; none where several rows could be meant."""
    found: dict[tuple[str, ...], dict[str, list[SeedGroup]]] = {}
    for group in groups:
        key, way = group.key, group.key.way
        if way in (TRAINED, DISTILLED):
            place = found.setdefault((key.dataset, key.model, key.quantizer, key.bits), {TRAINED: [], DISTILLED: []})
            place[way].append(group)
    pairs = [(ways[TRAINED], ways[DISTILLED]) for ways in found.values()]
    return [
        TeacherGain(trained[0], distilled[0])
        for trained, distilled in pairs
        if len(trained) == len(distilled) == 1 and trained[0].images == distilled[0].images
    ]


def gain_lines(summaries: Iterable[RunSummary]) -> list[str]:
    """A sentence for each pair: the gain, its standard error, and beside it the recorded one of the same experiment."""
    summaries = list(summaries)
    experiments = {summary.experiment for summary in summaries}
    recorded = [row for row in read_recorded() if experiments == {row.experiment}]
    lines = []
    for gain in teacher_gains(seed_groups(summaries)):
        found, key, images = gain.difference, gain.distilled.key, gain.distilled.images
        line = f"{key.bits}, distilled against trained: {found} points, {_seeds(gain)}"
        line += "" if images is None else f", {images} test images"
        for row in recorded:
            if (row.dataset, row.model, row.bits, row.test_images) == (key.dataset, key.model, key.bits, str(images)):
                line += f"; recorded over {row.seeds} seeds: {row.gain} ({row.error}; by seeds alone {row.seed_error})"
        lines.append(line + ".")
    return lines


def _seeds(gain: TeacherGain) -> str:
    """``3 seeds`` that both sides share, so that differences are of pairs, or ``10 and 2 seeds, not paired``."""
    if not gain.difference.paired:
        return f"{gain.distilled.seeds} and {gain.trained.seeds} seeds, not paired"
    return "one seed" if gain.difference.paired == 1 else f"{gain.difference.paired} seeds"


def recorded_of(experiment: str, summaries: Sequence[RunSummary], commits: Iterable[str]) -> list[Recorded]:
    """The gains of ``summaries``, all of ``experiment``, to be kept in :data:`RECORDED`."""
    rows = []
    for gain in teacher_gains(seed_groups(summaries)):
        found, key = gain.difference, gain.distilled.key
        trained, distilled = ([one.top1 for one in side.by_seed.values()] for side in (gain.trained, gain.distilled))
        rows.append(
            Recorded(
                experiment=experiment,
                dataset=key.dataset,
                model=key.model,
                bits=key.bits,
                test_images=str(gain.distilled.images),
                seeds=str(found.paired),
                trained=f"{fmean(trained):.2f}",
                trained_std=f"{stdev(trained):.2f}",
                distilled=f"{fmean(distilled):.2f}",
                distilled_std=f"{stdev(distilled):.2f}",
                gain=f"{found.points:+.2f}",
                error=f"{found.error:.2f}",
                seed_error=f"{found.seed_error:.2f}",
                commit=" ".join(sorted(set(commits))),
            )
        )
    return rows


def read_recorded() -> list[Recorded]:
    """The rows of :data:`RECORDED`."""
    with RECORDED.open(encoding="utf-8", newline="") as file:
        return [Recorded(**row) for row in csv.DictReader(file)]


def recorded_text(rows: Iterable[Recorded]) -> str:
    """The content of :data:`RECORDED` with ``rows``."""
    lines = [",".join(field.name for field in fields(Recorded))]
    lines += [",".join(asdict(row).values()) for row in rows]
    return "\n".join(lines) + "\n"
