"""How well each score orders the layers of ResNet-20, and what scores of large networks take: results/sensitivity.csv.

    QTRAIN_CIFAR10=DIR QTRAIN_RESNET20=FILE python scripts/sensitivity.py --work DIR
    python scripts/sensitivity.py --large resnet50 vit_small_patch16_224

The first measures what every layer's weight and input alone do at each width, on 1,024 training images, and computes
each score on other ones. ``spearman_kl`` and ``spearman_loss`` are rank correlations with the measured divergence and
with the measured rise of the cross-entropy, over the layers at one width, or over all layers and widths. ``passes`` is
the processor's time in units of one forward and backward of the score's own images, as in training. DIR keeps what is
measured, so a second run goes on where the first one stopped.

The second computes Fisher and the trace of networks with random weights, each in a process of its own, on a few images
of 224 x 224: ``peak_bytes`` is the most memory that the process had. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from qtrain.config.compose import compose
from qtrain.convert.bank import ROLES, QuantizerBank, Widths, make_bank
from qtrain.convert.layers import find_layers
from qtrain.convert.plan import LayerPlan
from qtrain.functional.losses import hard_loss, soft_target_loss
from qtrain.models.factory import create_model
from qtrain.observers.min_max import MinMax
from qtrain.pipeline.build_model import build_model, example_input
from qtrain.pipeline.conversion import layer_recipe, make_ready_
from qtrain.pipeline.load_data import load_data
from qtrain.pipeline.results import append_row, provenance
from qtrain.quantizers.uniform.lsq import LSQ
from qtrain.sensitivity.base import Done, DoneFile, Score, label_of, part_of, scores_of, scoring
from qtrain.sensitivity.fisher import Fisher
from qtrain.sensitivity.hawq_eigenvalue import HawqEigenvalue
from qtrain.sensitivity.hawq_trace import HawqTrace
from qtrain.sensitivity.limpq import Limpq
from qtrain.spec import Batch, Choice, PerChannel, Scores

ROOT = Path(__file__).resolve().parent.parent
SEED = 0
BITS = (2, 3, 4, 6, 8)
MEASURED, CALIBRATING = 8, 4
"""Batches of 128 images to measure on, at most, and others for the scores."""


class Case(NamedTuple):
    """A score and the images that it is given."""

    score: Score
    images: int


CASES = {
    "fisher": Case(Fisher(), 128 * CALIBRATING),
    "fisher, inputs whole": Case(Fisher(input="whole"), 128 * CALIBRATING),
    "fisher, weights diagonal": Case(Fisher(weight="diagonal"), 128 * CALIBRATING),
    "fisher, true labels": Case(Fisher(labels="data"), 128 * CALIBRATING),
    "limpq": Case(Limpq(), 128 * CALIBRATING),
    "hawq_trace": Case(HawqTrace(probes=16), 128),
    "hawq_eigenvalue": Case(HawqEigenvalue(iterations=10, images=16), 16),
}
"""The scores of the table; those with second derivatives see fewer images."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, help="folder that keeps what is measured; default: none is kept")
    parser.add_argument("--large", nargs="*", help="networks of timm, instead of ResNet-20")
    parser.add_argument("--measured", type=int, default=MEASURED, help="batches of 128 images to measure on")
    parser.add_argument("--only", nargs="*", default=sorted(CASES), help="scores")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # a network and a score, in this process
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "sensitivity.csv")
    options = parser.parse_args()
    if options.one:
        model, name = options.one
        large(model, name, options.results)
    elif options.large:
        for name in ("fisher", "hawq_trace"):
            for model in options.large:
                command = [sys.executable, __file__, "--one", model, name, "--results", str(options.results)]
                subprocess.run(command, check=True)
    else:
        with tempfile.TemporaryDirectory() as folder:
            small(options.work or Path(folder), options.only, options.measured, options.results)
    return 0


def small(work: Path, only: list[str], count: int, results: Path) -> None:
    """ResNet-20 with its real weights: every score against what is measured."""
    bank, batches = resnet20()
    held_out = batches[CALIBRATING : CALIBRATING + count]
    measured = measure(bank, held_out, DoneFile(work / "measured.jsonl"))
    for name, (score, seen) in CASES.items():
        if name not in only:
            continue
        given = first(batches, seen)
        cpu = processor_time()
        scores = score(bank, given, seed=SEED)
        cpu = processor_time() - cpu
        passes = cpu / one_pass(bank.model, given)
        for role, bits, kl, loss in correlations(scores, measured):
            print(f"{name} {role} {bits}: {kl:.3f} with the divergence, {loss:.3f} with the loss; {passes:.1f} passes")
            row = {
                "dataset": "cifar10", "model": "cifar_resnet20", "quantizer": "lsq", "score": name, "role": role,
                "bits": bits, "images": seen, "measured_images": count * 128, "spearman_kl": kl,
                "spearman_loss": loss, "passes": passes, "cpu_s": cpu,
            }  # fmt: skip
            append_row(results, common() | row)


@torch.no_grad()
def measure(bank: QuantizerBank, batches: list[Batch], done: Done) -> dict[str, Scores]:
    """What ``OneLayer`` gives by both of its measures, from one forward for each choice."""
    image, target = torch.cat([b.image for b in batches]), torch.cat([b.target for b in batches])

    def both(choice: Choice, exact: Tensor) -> list[float]:
        bank.put_([choice])
        logits = bank.model(image).double()
        divergence, loss = soft_target_loss(logits, exact, 1.0), hard_loss(logits, target) - hard_loss(exact, target)
        return [float(divergence), float(loss)]

    with scoring(bank) as model:
        exact = model(image).double()
        found = {c: part_of(done, label_of(c), partial(both, c, exact)) for c in bank.choices()}
    return {name: scores_of({c: row[place] for c, row in found.items()}) for place, name in enumerate(("kl", "loss"))}


def resnet20() -> tuple[QuantizerBank, list[Batch]]:
    """Its bank at all widths, and batches of 128 training images without augmentation."""
    settings = compose(["+experiment=cifar10/calibrated", "variants=null", f"seed={SEED}"])
    data = load_data(settings)
    data.setup()
    batches = data.calibration_batches(CALIBRATING + MEASURED)
    assert all(len(batch.image) == 128 for batch in batches)
    model = build_model(settings.model, data.info).eval()
    found, operands, _ = make_ready_(settings, model, example_input(data.info))
    images = [batches[0].image]
    return make_bank(model, found, layer_recipe(settings), Widths(BITS, BITS), images, fixed=operands), batches


def correlations(scores: Scores, measured: dict[str, Scores]) -> Iterator[tuple[str, str, float, float]]:
    """Role, bits and the two correlations: at each width, and over all of them."""
    for role in ROLES:
        ours = getattr(scores, role)
        for widths in [*[(bits,) for bits in BITS], BITS]:
            places = [(layer, bits) for layer in ours for bits in widths]
            values = [ours[layer][bits] for layer, bits in places]
            found = [
                float(spearmanr(values, [getattr(measured[m], role)[layer][bits] for layer, bits in places]).statistic)
                for m in ("kl", "loss")
            ]
            yield role, str(widths[0]) if len(widths) == 1 else "all", found[0], found[1]


def first(batches: list[Batch], count: int) -> list[Batch]:
    """The first ``count`` images of ``batches`` of 128."""
    whole, rest = divmod(count, 128)
    return batches[:whole] + ([Batch(*(part[:rest] for part in batches[whole]))] if rest else [])


def one_pass(model: nn.Module, batches: list[Batch]) -> float:
    """Seconds of the processor for a forward and a backward of ``batches`` by all weights."""
    times = []
    for _ in range(2):
        start = processor_time()
        for batch in batches:
            nn.functional.cross_entropy(model(batch.image), batch.target).backward()
        times.append(processor_time() - start)
    model.zero_grad()
    return min(times)


def large(name: str, score: str, results: Path) -> None:
    """A network with random weights: time and memory of one score, at five widths of weights and of inputs."""
    torch.manual_seed(SEED)
    model = create_model(name=name, num_classes=1000, image_size=224).eval()
    images, count = torch.randn(4, 3, 224, 224), 4
    parts = list(images.split(count))
    batches = [Batch(images, torch.arange(count) * 100, torch.arange(count))]
    recipe = LayerPlan(
        weight=partial(LSQ, granularity=PerChannel()), input=LSQ, weight_observer=MinMax, input_observer=MinMax
    )
    widths = Widths((2, 3, 4, 6, 8), (2, 3, 4, 6, 8))
    bank = make_bank(model, find_layers(model, images[:1]), recipe, widths, parts)
    made: dict[str, Score] = {"fisher": Fisher(chunk=count), "hawq_trace": HawqTrace(probes=2, chunk=count)}
    cpu, wall = processor_time(), time.perf_counter()
    found = made[score](bank, batches, seed=SEED)
    cpu, wall = processor_time() - cpu, time.perf_counter() - wall
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    one = one_pass(model, [Batch(part, torch.arange(count), torch.arange(count)) for part in parts])
    print(f"{name} {score}: {len(found.weight)} layers, {peak / 2**30:.2f} GiB, {cpu:.0f} s, {cpu / one:.1f} passes")
    row = {
        "dataset": "random", "model": name, "quantizer": "lsq", "score": score, "images": len(images),
        "passes": cpu / one, "cpu_s": cpu, "wall_s": round(wall, 1), "peak_bytes": peak,
        "notes": f"random weights, {count} images at a time" + (", 2 probes" if score == "hawq_trace" else ""),
    }  # fmt: skip
    append_row(results, common() | row)


def common() -> dict[str, object]:
    return {"experiment": "sensitivity", "task": "score", "seed": SEED, **provenance()}


def processor_time() -> float:
    return time.process_time()


if __name__ == "__main__":
    sys.exit(main())
