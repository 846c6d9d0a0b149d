"""How much of timm's CNNs ONNX Runtime computes in integers: as qtrain exports them, and as its own quantizer does.

    python scripts/export_timm.py                                    # ten networks, images of 64 pixels
    python scripts/export_timm.py --models resnet18 --size 224 --rounds 30 --results results/export_speed.csv

Weights are random: which layers a runtime merges, and how long they take, does not depend on them. Batch norms get the
statistics of random images, and no gamma is zero, since branches that count for nothing would be optimized away. The
student has 8 bits and ``target=onnxruntime``. With ``--rounds`` both files and full precision are timed in turns too,
one image at a time, on one thread. Nothing is asserted.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import qtrain
from qtrain.deployment.benchmark.integers import in_integers
from qtrain.deployment.benchmark.rivals import EXPORT, RUNTIME_INT8, rivals, timed
from qtrain.deployment.onnx.symbolic import OPSET
from qtrain.deployment.onnx.write import export
from qtrain.models.factory import create_model
from qtrain.pipeline.benchmark import integer_columns, timing_columns
from qtrain.pipeline.results import append_row, provenance, read_results
from qtrain.utils.errors import one_line

MODELS = (
    "resnet18", "mobilenetv2_100", "mobilenetv3_small_100", "tf_efficientnet_lite0", "regnetx_002", "densenet121",
    "repvgg_a0", "ghostnet_100", "mnasnet_small", "convnext_atto",
)  # fmt: skip
RESULTS = Path("results/export_timm.csv")
IMAGES = 8


@torch.no_grad()
def settled(name: str, images: Tensor) -> nn.Module:
    """The network ``name`` with random weights, as after training in what decides how it is merged."""
    torch.manual_seed(0)
    model = create_model(name=name, num_classes=1000, image_size=images.shape[-1])
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.uniform_(module.bias, -0.1, 0.1)
            module.momentum = None  # statistics of all images so far
            module.reset_running_stats()
    model.train()(images)
    return model.eval()


def measured(name: str, size: int, rounds: int) -> dict[str, object]:
    """The columns of ``name``: layers in integers of both files, and times where ``rounds`` is not 0."""
    images = torch.randn(IMAGES, 3, size, size, generator=torch.Generator().manual_seed(0))
    model = settled(name, images)
    shape = (3, size, size)
    student = qtrain.quantize(
        model, images, weight_bits=8, input_bits=8, target="onnxruntime",
        weight_observer="min_max", input_observer="min_max",
        options=["quantize.weight.init=range", "quantize.input.init=range"],  # as the recipes for calibration have it
    )  # fmt: skip
    files = {EXPORT: export(student, shape).to_bytes(), **rivals(model, [images], shape, opset=OPSET)}
    row = integer_columns({each: in_integers(files[each], shape) for each in (EXPORT, RUNTIME_INT8)})
    if rounds:
        row |= {"rounds": rounds, "batch": 1, "threads": 1}
        row |= timing_columns(timed(files, images[:1], rounds=rounds, threads=1))
    return row


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="of timm (%(default)s)")
    parser.add_argument("--size", type=int, default=64, help="pixels (%(default)s)")
    parser.add_argument("--rounds", type=int, default=0, help="of timing; 0: none (%(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="CSV file, a row for each model (%(default)s)")
    options = parser.parse_args(arguments)
    logging.disable(logging.WARNING)  # the row says what stays in floating point
    done = {row["model"] for row in read_results(options.results)} if options.results.is_file() else set()
    for name in options.models:
        if name in done:
            print(f"{name}: {options.results} has it")
            continue
        try:
            found = measured(name, options.size, options.rounds)
        except Exception as error:  # whatever a model raises is the finding
            found = {"reason": f"{type(error).__name__}: {one_line(error)}"[:300]}
        row = {"task": "export_timm", "model": name, "quantizer": "lsq", "w_bits": 8, "a_bits": 8, "seed": 0,
               "image_size": options.size, "notes": f"load {os.getloadavg()[0]:.1f}"}  # fmt: skip
        append_row(options.results, provenance() | row | found)
        print(name, *(f"{key}={value}" for key, value in found.items() if value != ""), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
