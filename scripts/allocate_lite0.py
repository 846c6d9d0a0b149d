"""EfficientNet-Lite0 at a mean of 4 bits a weight: bits by the integer program beside uniform ones.

    QTRAIN_IMAGENET=DIR QTRAIN_EFFICIENTNET_LITE0=DIR/efficientnet_lite0.safetensors python scripts/allocate_lite0.py

DIR is that of ``scripts/efficientnet_lite0.py``. Inputs have 8 bits, and no student is trained. No model has more bytes
than the uniform one of 4 bits in all layers; rows whose name says so are larger. Every fourth picture calibrates and
gives the scores, and the others judge: ``results/allocation_lite0.csv`` gets a row for each allocation, with the part
of them on which the student predicts the class that full precision predicts, and the divergence from it in nats. Rows
that the table has are not made again.
"""

import argparse
import copy
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from qtrain.config.compose import compose
from qtrain.costs.count import count
from qtrain.data.base import VisionData
from qtrain.functional.losses import soft_target_loss
from qtrain.pipeline.build_model import build_model, example_input
from qtrain.pipeline.load_data import load_data
from qtrain.pipeline.prepare import prepare_student
from qtrain.pipeline.results import append_row, provenance, read_results
from qtrain.utils.errors import ConfigError
from qtrain.utils.eval_mode import evaluating

RESULTS = Path("results/allocation_lite0.csv")

COMMON = (
    "+experiment=imagenet/efficientnet_lite0",
    "task=calibrate",
    "logger=none",
    "quantize.bits.weight=4",
    "quantize.fold=before",  # so that each layer has a bias to correct
)
NO_ENDS = ("quantize.bits.first=null", "quantize.bits.last=null")
PROGRAM = (
    "allocate@quantize.bits=integer_program",
    "allocate.weight=[3,4,5,6,8]",
    "allocate.input=[8]",
    "allocate.batches=2",  # of 25 pictures
    "allocate.budgets={size_bytes: 100%, bops: null}",
)
DEPTHWISE = ("allocate@quantize.bits=manual", 'quantize.bits.layers={"*conv_dw": [8, 8]}', "quantize.bits.input=8")
BIAS = ("bias@quantize.bias=batches",)

ROWS: dict[str, tuple[str, ...]] = {
    "uniform": NO_ENDS,
    "program-fisher": (*PROGRAM, *NO_ENDS),
    "program-one_layer": (*PROGRAM, *NO_ENDS, "score@allocate.score=one_layer"),
    "uniform, larger: ends of 8 bits": (),
    "uniform, larger: depthwise of 8 bits": (*DEPTHWISE, *NO_ENDS),
}
"""Allocations -> what chooses them."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=[*ROWS], choices=[*ROWS])
    parser.add_argument("--bias", nargs="+", default=["corrected"], choices=["as calibrated", "corrected"])
    parser.add_argument("--every", type=int, default=1, help="judge by every so many batches of 50 pictures")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    before = read_results(options.results) if options.results.is_file() else []
    there = {(row["allocator"], row["bias"]) for row in before}
    wanted = [(name, bias) for bias in options.bias for name in options.rows if (name, bias) not in there]
    exact: list[tuple[Tensor, Tensor, Tensor]] = []
    try:
        for name, bias in wanted:
            start = time.perf_counter()
            settings = compose([*COMMON, *ROWS[name], *(BIAS if bias == "corrected" else ())])
            data = load_data(settings)
            data.setup()
            model = build_model(settings.model, data.info).eval()
            print(f"{name}, {bias}", flush=True)
            exact = exact or [*judging(data, model, options.every)]
            prepared = prepare_student(settings, copy.deepcopy(model), data)
            row = measured(prepared.student.eval(), exact)
            cost = count(prepared.student, example_input(data.info))
            row |= {
                "experiment": "imagenet/efficientnet_lite0", "task": "calibrate", "dataset": "parquet",
                "model": settings.model.name, "quantizer": "lsq", "a_bits": 8, "seed": settings.seed,
                "size_bytes": cost.size_bytes, "effective_bits": cost.effective_bits, "bops": cost.bops,
                "wall_s": round(time.perf_counter() - start, 1), "allocator": name, "bias": bias, **provenance(),
            }  # fmt: skip
            append_row(options.results, row)
            print(f"{name}, {bias}:", *(f"{key}={value}" for key, value in row.items()), flush=True)
            print({layer: bits.weight for layer, bits in prepared.allocation.items() if bits.weight < 32}, flush=True)
    except ConfigError as error:
        print(f"allocate_lite0: error: {error}", file=sys.stderr)
        return 2
    return 0


@torch.no_grad()
def judging(data: VisionData, model: nn.Module, every: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches of pictures that do not calibrate: images, labels, and logits in full precision."""
    seen = {image.numpy().tobytes() for batch in data.calibration_batches(1000) for image in batch.image}
    for batch in islice(data.test_dataloader(), 0, None, every):
        kept = torch.tensor([image.numpy().tobytes() not in seen for image in batch.image])
        yield batch.image[kept], batch.target[kept], model(batch.image[kept])


@torch.no_grad()
def measured(student: nn.Module, exact: Sequence[tuple[Tensor, Tensor, Tensor]]) -> dict[str, object]:
    """On how many pictures ``student`` agrees with full precision, and both accuracies."""
    images = sum(len(target) for _, target, _ in exact)
    agree = right = right_before = 0
    divergence = 0.0
    with evaluating(student):
        for image, target, before in exact:
            logits = student(image)
            agree += int((logits.argmax(1) == before.argmax(1)).sum())
            right += int((logits.argmax(1) == target).sum())
            right_before += int((before.argmax(1) == target).sum())
            divergence += len(image) * float(soft_target_loss(logits.double(), before.double(), 1.0))
    return {
        "judged_images": images, "agreeing": agree, "agreement": 100 * agree / images, "top1": 100 * right / images,
        "fp_top1": 100 * right_before / images, "divergence": divergence / images,
    }  # fmt: skip


if __name__ == "__main__":
    logging.getLogger("qtrain").setLevel(logging.INFO)
    sys.exit(main())
