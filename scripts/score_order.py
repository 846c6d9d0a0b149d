"""How well each score orders whole allocations of ResNet-20: results/score_order.csv.

    QTRAIN_CIFAR10=DIR QTRAIN_RESNET20=FILE python scripts/score_order.py --work DIR

``scripts/sensitivity.py`` asks whether a score orders single layers. A search needs the order of allocations that cost
the same. So for each budget there are random allocations, changes of the uniform one, and the best by each score, all
within the budget. Each is measured on 512 training images that the scores have not seen: as calibrated, and with batch
norm statistics estimated anew. Spearman's rank correlations, of the sum of scores
with the divergence from full precision and with the number of errors, are over the allocations that no score has
chosen. DIR keeps what is measured, so a second run goes on where the first one stopped.
"""

import argparse
import copy
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).resolve().parent))
from allocate import BUDGETS, UNIFORM, overrides

from qtrain.allocate.feasible import Feasible
from qtrain.allocate.integer_program import IntegerProgram
from qtrain.allocate.problem import Problem
from qtrain.allocate.uniform import Uniform
from qtrain.config.compose import compose
from qtrain.functional.losses import soft_target_loss
from qtrain.pipeline.allocate import find_bits
from qtrain.pipeline.build_model import build_model
from qtrain.pipeline.load_data import load_data
from qtrain.pipeline.results import append_row, provenance
from qtrain.sensitivity.base import DoneFile, Score, part_of
from qtrain.sensitivity.fisher import Fisher
from qtrain.sensitivity.one_layer import OneLayer
from qtrain.spec import Allocation, Batch, LayerBits, Scores
from qtrain.training.callbacks.batchnorm import reestimate_batchnorm
from qtrain.utils.eval_mode import evaluating

ROOT = Path(__file__).resolve().parent.parent
SEED = 0
SCORED, CALIBRATING, HELD_OUT = 2, 4, 4
"""Batches of 128 images: for the scores, to calibrate with, and to measure on; the last ones are others."""

ENDS = LayerBits(8, 8)


def around(weight: int, input: int) -> OneLayer:
    return OneLayer(reference=Uniform(weight=weight, input=input, first=ENDS, last=ENDS))


SCORES: dict[str, Score] = {
    "fisher": Fisher(),
    "one_layer": OneLayer(),
    "one_layer around W3A3": around(3, 3),
    "one_layer around W4A2": around(4, 2),
    "one_layer around W32A2": around(32, 2),
}
LEFT = (1.0, 0.1)
"""Parts of a weight's error that a score counts."""

WAYS = ("calibrated", "batch norm")


class Measured(NamedTuple):
    """Nats and the part of images that are classified wrongly."""

    divergence: float
    errors: float


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder that keeps what is measured")
    parser.add_argument("--budgets", nargs="+", default=["w2.5", "half"], choices=list(BUDGETS))
    parser.add_argument("--scores", nargs="+", default=list(SCORES), choices=list(SCORES))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--allocations", type=int, default=10, help="random ones, and as many near the uniform one")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "score_order.csv")
    options = parser.parse_args()
    for budget in options.budgets:
        problem, batches = problem_of(budget)
        held_out = batches[CALIBRATING:]
        scores = {name: scores_by(name, problem, batches[:SCORED], options.work) for name in options.scores}
        drawn = dict(allocations(problem, budget, options.allocations))
        found = {
            f"{name}, {left:g}": IntegerProgram().search(replace(problem, scores=of.with_weight_error(left)))
            for name, of in scores.items()
            for left in LEFT
        }
        for way in options.ways:
            done = DoneFile(options.work / f"{budget}-{way.replace(' ', '-')}.jsonl")

            def measured(allocation: Allocation, way: str = way, done: DoneFile = done) -> Measured:
                name = str(sorted(allocation.items()))
                numbers = part_of(done, name, lambda: [*measure(way, problem, allocation, batches)])  # noqa: B023
                return Measured(*numbers)

            common = {
                "experiment": "cifar10/resnet20_w4a4", "task": "score", "dataset": "cifar10", "model": "cifar_resnet20",
                "quantizer": "lsq", "seed": SEED, "budget": budget, "way": way, "images": 128 * SCORED,
                "measured_images": 128 * len(held_out), **provenance(),
            }  # fmt: skip
            rows = {name: measured(allocation) for name, allocation in drawn.items()}
            for name, of in scores.items():
                for left in LEFT:
                    totals = [of.with_weight_error(left).total(a) for a in drawn.values()]
                    kl, errors = (
                        float(spearmanr(totals, [getattr(rows[n], field) for n in drawn]).statistic)
                        if len(drawn) > 2
                        else math.nan
                        for field in Measured._fields
                    )
                    best = measured(found[f"{name}, {left:g}"])
                    print(
                        f"{budget} {way}: {name}, {left:g} of weights: {kl:.2f} with divergence, {errors:.2f} with "
                        f"errors; its best {best.divergence:.3f} nats, {100 * best.errors:.1f} % wrong",
                        flush=True,
                    )
                    row = {
                        "score": name, "weight_error": left, "allocations": len(drawn), "spearman_kl": kl,
                        "spearman_errors": errors, "best_kl": best.divergence, "best_errors": best.errors,
                        "uniform_kl": rows["uniform"].divergence, "uniform_errors": rows["uniform"].errors,
                    }  # fmt: skip
                    append_row(options.results, common | row)
            print({n: (round(r.divergence, 3), round(r.errors, 3)) for n, r in rows.items()}, flush=True)
    return 0


def problem_of(budget: str) -> tuple[Problem, list[Batch]]:
    """The problem with its bank, and batches to calibrate with and to measure on."""
    settings = compose([*overrides(budget, "random", "calibrated", SEED), f"allocate.batches={CALIBRATING}"])
    data = load_data(settings)
    data.setup()
    images = data.calibration_batches(CALIBRATING + HELD_OUT)
    model = build_model(settings.model, data.info).eval()
    found = find_bits(settings, model, images[:CALIBRATING], keep=False)
    return found.problem, images


def scores_by(name: str, problem: Problem, batches: Sequence[Batch], work: Path) -> Scores:
    assert problem.bank is not None
    done = DoneFile(work / f"{name.replace(' ', '-')}.jsonl")
    return SCORES[name](problem.bank, batches, seed=SEED, done=done)


def allocations(problem: Problem, budget: str, count: int) -> Iterator[tuple[str, Allocation]]:
    """The uniform bits, ``count`` random allocations, and ``count`` with some layers of the uniform one drawn anew."""
    feasible = Feasible(problem, np.random.default_rng(SEED))
    weight, input = UNIFORM[budget]["uniform"]
    layers = [group.layers[0] for group in feasible.groups]
    bits = Uniform(weight=weight, input=input, first=ENDS, last=ENDS)(layers)
    uniform = tuple(group.options.index(bits[layer]) for layer, group in zip(layers, feasible.groups, strict=True))
    yield "uniform", feasible.allocation(uniform)
    for number in range(count):
        yield f"random {number}", feasible.allocation(feasible.draw())
        yield f"near uniform {number}", feasible.allocation(feasible.mutated(uniform, change=0.3))


def measure(way: str, problem: Problem, allocation: Allocation, batches: Sequence[Batch]) -> Measured:
    """What ``allocation`` does on the batches that are held out."""
    bank = problem.bank
    assert bank is not None
    bank.put_([])
    exact = copy.deepcopy(bank.model).eval()
    bank.use_(allocation)
    model = copy.deepcopy(bank.model)
    if way != "calibrated":
        reestimate_batchnorm(model, [batch.image for batch in batches[:CALIBRATING]])
    rows = []
    with torch.no_grad(), evaluating(model):
        for batch in batches[CALIBRATING:]:
            logits = model(batch.image)
            wrong = (logits.argmax(1) != batch.target).double().mean()
            rows.append([float(soft_target_loss(logits.double(), exact(batch.image).double(), 1.0)), float(wrong)])
    return Measured(*np.mean(rows, axis=0).tolist())


if __name__ == "__main__":
    sys.exit(main())
