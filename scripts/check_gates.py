"""Whether recipes still reach what they reached: each one's figure may not fall below its floor.

    python scripts/check_gates.py                       # runs the recipes of at most two minutes
    python scripts/check_gates.py --minutes 30          # and longer ones
    python scripts/check_gates.py --only 'calibrated*'
    python scripts/check_gates.py --write               # after new rows: works out figures and floors anew

``results/gates.yaml`` lists the recipes: the command, how long it takes on a core, and which rows of ``results/`` tell
what it reached. The figure is the mean of their ``top1``. The floor is two standard deviations below: those over the
seeds, or, where there are fewer than three, of the number of test images (binomial). Exit code 1: one fell below.
"""

import argparse
import logging
import math
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import yaml

from qtrain.config.compose import compose
from qtrain.pipeline.results import read_results
from qtrain.run_task import run_task
from qtrain.utils.atomic_write import write_text
from qtrain.utils.errors import ConfigError

GATES = Path("results/gates.yaml")
FEW_SEEDS = 3
"""Fewer than so many tell nothing of how far seeds spread."""


@dataclass(frozen=True)
class Gate:
    """A recipe: its ``command``, the ``rows`` of ``file`` that tell what it reached, and its floor.

    ``figure`` and ``floor`` are in percent. ``rows`` has for each column a pattern such as ``soft*``, or a list of
    patterns. ``images`` is the number of test images, for rows that do not give it.
    """

    recipe: str
    command: str
    file: str
    rows: Mapping[str, str | list[str]]
    minutes: float
    images: int
    figure: float = math.nan
    floor: float = -math.inf


def read_gates(path: Path) -> list[Gate]:
    return [Gate(**entry) for entry in yaml.safe_load(path.read_text(encoding="utf-8"))]


def reached(gate: Gate, rows: Sequence[Mapping[str, str]]) -> dict[str, list[float]]:
    """The accuracies of the gate's among ``rows``, by seed. Raises ``ValueError`` where there is none."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row.get("top1") and all(_fits(row.get(column, ""), patterns) for column, patterns in gate.rows.items()):
            found.setdefault(row["seed"], []).append(float(row["top1"]))
    if not found:
        raise ValueError(f"gates: no row of {gate.recipe} has {dict(gate.rows)}; correct `rows` in the list of gates")
    return found


def _fits(value: str, patterns: str | list[str]) -> bool:
    return any(fnmatchcase(value, each) for each in ([patterns] if isinstance(patterns, str) else patterns))


def figure_and_floor(top1: Mapping[str, Sequence[float]], images: int) -> tuple[float, float]:
    """Mean over seeds, and what is two standard deviations below, both in percent, rounded to hundredths."""
    seeds = [statistics.fmean(values) for values in top1.values()]
    mean = statistics.fmean(seeds)
    share = mean / 100
    spread = statistics.stdev(seeds) if len(seeds) >= FEW_SEEDS else 100 * math.sqrt(share * (1 - share) / images)
    return round(mean, 2), round(mean - 2 * spread, 2)


def run_gate(gate: Gate, folder: Path) -> float:
    """Run the command; the mean accuracy of its rows in percent."""
    overrides = [*gate.command.split(), f"output={folder}", "logger=none"]
    run_task(compose(overrides), overrides)
    rows = [row for table in folder.glob("**/results.csv") for row in read_results(table)]
    return figure_and_floor(reached(gate, rows), gate.images)[0]


def write_gates(path: Path) -> None:
    """Replace the figures and floors in ``path`` by those of the rows; comments at its top stay."""
    text = path.read_text(encoding="utf-8")
    head = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    entries = yaml.safe_load(text)
    for entry in entries:
        gate = Gate(**entry)
        top1 = reached(gate, read_results(path.parent / gate.file))
        entry["figure"], entry["floor"] = figure_and_floor(top1, gate.images)
    write_text(path, head + yaml.safe_dump(entries, sort_keys=False, width=1000))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gates", type=Path, default=GATES, help="the list (%(default)s)")
    parser.add_argument("--minutes", type=float, default=2, help="leave out what takes longer (%(default)s)")
    parser.add_argument("--only", default="*", help="pattern of the recipes' names")
    parser.add_argument("--write", action="store_true", help="work out figures and floors from the rows; run nothing")
    options = parser.parse_args(arguments)
    try:
        if options.write:
            write_gates(options.gates)
            return 0
        gates = [gate for gate in read_gates(options.gates) if fnmatchcase(gate.recipe, options.only)]
        wanted = [gate for gate in gates if gate.minutes <= options.minutes]
        fallen = 0
        for gate in wanted:
            with tempfile.TemporaryDirectory() as folder:
                found = run_gate(gate, Path(folder))
            fallen += found < gate.floor
            verdict = "FALLS BELOW" if found < gate.floor else "reaches"
            print(f"{gate.recipe}: {found:.2f} % {verdict} {gate.floor:.2f} (was {gate.figure:.2f})", flush=True)
        print(f"{len(wanted)} recipes run, {fallen} below their floor; {len(gates) - len(wanted)} longer ones left out")
    except (ConfigError, ValueError, OSError) as error:
        print(f"check_gates: error: {error}", file=sys.stderr)
        return 2
    return int(fallen > 0)


if __name__ == "__main__":
    logging.getLogger("qtrain").setLevel(logging.WARNING)
    sys.exit(main())
