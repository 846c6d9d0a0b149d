"""How long a search over bits takes once it has its scores, and one question of what a model costs.

    python scripts/bench_allocation.py                                   # ResNet-20 and ResNet-50, budgets of W4A4
    python scripts/bench_allocation.py --models resnet18 --results results/solve.csv

Every layer may have 2, 3, 4, 5, 6 or 8 bits, its weight and its input apart, under two budgets: the bytes and the bit
operations of uniform 4 bits. Scores are drawn: about a quarter for each further bit, as rounding errors are, each
tensor's times a number of its own. Figures are processor seconds, the median over the rounds, so that other work on the
machine changes them little. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch

from qtrain.allocate.base import Search
from qtrain.allocate.integer_program import IntegerProgram
from qtrain.allocate.pareto import Pareto
from qtrain.allocate.problem import Problem
from qtrain.costs.geometry import layer_geometries
from qtrain.costs.metrics.bit_operations import BitOperations
from qtrain.costs.metrics.size import SizeBytes
from qtrain.costs.tables import codes_alone, cost_table
from qtrain.models.factory import create_model
from qtrain.pipeline.results import append_row, check_results, provenance
from qtrain.spec import LayerBits, Scores

WIDTHS = (2, 3, 4, 5, 6, 8)
UNIFORM = LayerBits(4, 4)
SEARCHES: dict[str, Search] = {"integer program": IntegerProgram(), "Pareto": Pareto()}

QUERIES = 1000
"""Allocations whose cost is asked for at a time."""


def problem_of(model: str, seed: int) -> Problem:
    """Which layer of ``model`` gets how many bits, at the cost of :data:`UNIFORM`; ``seed`` draws the scores."""
    size, classes = (32, 10) if model.startswith("cifar_") else (224, 1000)
    network = create_model(name=model, num_classes=classes)
    geometries = layer_geometries(network, torch.zeros(1, 3, size, size))
    options = {one.name: tuple(LayerBits(*pair) for pair in product(WIDTHS, WIDTHS)) for one in geometries}
    metrics = {"size_bytes": SizeBytes(), "bops": BitOperations()}
    costs = {
        name: cost_table(metric, geometries, options, codes_alone(geometries), 0) for name, metric in metrics.items()
    }
    uniform = dict.fromkeys(options, UNIFORM)
    source = np.random.default_rng(seed)

    def falling() -> dict[str, dict[int, float]]:
        return {
            name: {bits: float(own * 4.0**-bits) for bits in WIDTHS}
            for name, own in zip(options, source.lognormal(size=len(options)), strict=True)
        }

    budgets = {name: table.total(uniform) for name, table in costs.items()}
    return Problem(options, costs, budgets, Scores(falling(), falling()))


def processor_s(run: Callable[[], object], rounds: int) -> float:
    """The median of the processor's seconds for ``run``."""
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


def rows_of(model: str, *, rounds: int, seed: int) -> list[dict[str, object]]:
    """A row for each search and one for the question of a cost."""
    problem = problem_of(model, seed)
    layers, uniform = len(problem.options), dict.fromkeys(problem.options, UNIFORM)
    rows: list[dict[str, object]] = []
    for name, search in SEARCHES.items():
        found = search.search(problem)
        assert problem.fits(found)
        ratio = problem.scores.total(found) / problem.scores.total(uniform)
        seconds = processor_s(partial(search.search, problem), rounds)
        rows.append({"case": name, "processor_s": seconds, "score_ratio": ratio})

    def ask() -> None:
        for _ in range(QUERIES):
            problem.costs["size_bytes"].total(uniform)

    rows.append({"case": "size of an allocation", "processor_s": processor_s(ask, rounds) / QUERIES})
    about = {"model": model, "seed": seed, "layers": layers, "options": len(WIDTHS) ** 2, "budgets": 2}
    return [{**row, **about} for row in rows]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["cifar_resnet20", "resnet50"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, help="CSV file that gets a row for each case")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    if options.results:
        check_results(str(options.results))
    for model in options.models:
        for row in rows_of(model, rounds=options.rounds, seed=options.seed):
            print(f"{model}, {row['layers']} layers: {row['case']} {row['processor_s']:.3g} s")
            if options.results:
                append_row(options.results, {**provenance(), "task": "bench_allocation", **row})
    return 0


if __name__ == "__main__":
    sys.exit(main())
