"""Bits for a latency: what the program finds by measured layers, and how long its file then really takes.

    QTRAIN_CIFAR10=DIR QTRAIN_RESNET20=FILE python scripts/allocate_latency.py --runtime openvino

ResNet-20 in a runtime that computes with 8 bits or in floating point. ``task=profile`` measures its layers, and the
integer program, by Fisher's scores, chooses between 8 bits and 32 for each weight and each input. A budget is a part of
what the network takes with 8 bits everywhere, which loses most; more time allows more floating point. The student is
calibrated and exported, and its file runs in turns with those of uniform 8 bits and of full precision, one image at a
time. ``results/latency_allocation.csv`` gets a row for each budget, also for one that no bits can meet, with what the
cheapest would take.
"""

import argparse
import copy
import logging
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from torch import nn

from qtrain.config.compose import compose
from qtrain.costs.count import count
from qtrain.costs.geometry import layer_geometries
from qtrain.costs.tables import further_cost
from qtrain.data.base import VisionData
from qtrain.deployment.benchmark.timing import Spread, in_turns, ratio
from qtrain.deployment.onnx.write import export
from qtrain.deployment.profile.measure import Runs
from qtrain.nn import Operand
from qtrain.pipeline.build_model import build_model, example_input
from qtrain.pipeline.load_data import load_data
from qtrain.pipeline.prepare import prepare_student, settle_for_target_
from qtrain.pipeline.pretrain import full_precision_weights
from qtrain.pipeline.profile import profile
from qtrain.pipeline.results import append_row, provenance
from qtrain.settings.run_settings import RunSettings
from qtrain.spec import FULL_PRECISION, Allocation
from qtrain.training.evaluation import evaluate
from qtrain.utils.errors import ConfigError

RESULTS = Path("results/latency_allocation.csv")

COMMON = ("+experiment=cifar10/resnet20_w4a4", "logger=none", "quantize.bits.weight=8", "quantize.bits.input=8")
FREE = ("quantize.bits.first=null", "quantize.bits.last=null")
CHOICE = (
    "allocate@quantize.bits=integer_program",
    "allocate.weight=[8,32]",
    "allocate.input=[8,32]",
    "allocate.batches=4",
    "+cost@allocate.costs.latency=latency",
    "allocate.budgets={size_bytes: null, bops: null}",
)
MICRO = 1e6


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runtime", default="openvino", choices=["onnxruntime", "openvino"])
    parser.add_argument("--budgets", nargs="+", default=["80%", "125%", "200%"], help="parts of what 8 bits take")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--images", type=int, default=10_000, help="test images that judge")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "latency.json"
        own = (*COMMON, *FREE, f"target={options.runtime}", f"data.max_test={options.images}")
        told = (f"profile.runtime={options.runtime}", "profile.widths=[8,32]", f"profile.rounds={options.rounds}")
        profile(compose([*COMMON, *FREE, "task=profile", *told, f"profile.output={table}"]))
        plain = compose([*own, "task=calibrate"])
        student, data, _ = calibrated(plain)
        files = {"full precision": file_of(model_of(plain, data), plain), "8 bits": file_of(student, plain)}
        runs = Runs(options.runtime, 1, options.rounds, plain.export.opset)
        for budget in options.budgets:
            chosen = (f"allocate.costs.latency.table={table}", f"+allocate.budgets.latency={budget}")
            settings = compose([*own, "task=calibrate", *CHOICE, *chosen, f"allocate.folder={folder}/allocate"])
            row = {"experiment": "latency", "task": "calibrate", "dataset": "cifar10", "model": settings.model.name,
                   "runtime": options.runtime, "budget": budget, "seed": settings.seed, **provenance()}  # fmt: skip
            try:
                row |= measured(settings, files, runs)
            except ConfigError as error:
                cheapest = re.search(r"budgets\.latency: ([\d,.]+) us cannot be reached; .* ([\d,.]+) us", str(error))
                if cheapest is None:
                    raise
                row |= {"budget_us": cheapest[1], "predicted_us": cheapest[2], "notes": "cannot be met"}
            append_row(options.results, row)
            print(*(f"{key}={value}" for key, value in row.items()), flush=True)
    return 0


def model_of(settings: RunSettings, data: VisionData) -> nn.Module:
    """The network in full precision, with its trained weights."""
    return build_model(settings.model, data.info, weights=full_precision_weights(settings.model, settings, data)).eval()


def calibrated(settings: RunSettings) -> tuple[nn.Module, VisionData, Allocation]:
    """The student at the bits that ``settings`` name or find, its images, and these bits."""
    data = load_data(settings)
    data.setup()
    prepared = prepare_student(settings, copy.deepcopy(model_of(settings, data)), data)
    settle_for_target_(prepared.student)
    return prepared.student.eval(), data, prepared.allocation


def file_of(model: nn.Module, settings: RunSettings) -> bytes:
    """``model`` as ONNX, for one image at a time."""
    return export(model, (3, 32, 32), opset=settings.export.opset, batch=1).to_bytes()


def measured(settings: RunSettings, files: dict[str, bytes], runs: Runs) -> dict[str, object]:
    """What was predicted for the bits that are found, what their file takes, and how good the student is."""
    start = time.perf_counter()
    student, data, allocation = calibrated(settings)
    latency = settings.allocate.costs["latency"]
    assert latency is not None
    example = example_input(data.info)
    told = further_cost(latency.build(), student, count(student, example), layer_geometries(student, example))
    images = np.random.default_rng(0).random((1, 3, 32, 32), dtype=np.float32)
    sessions = {name: runs.session(one) for name, one in {**files, "found": file_of(student, settings)}.items()}
    calls = {name: partial(session.run, images) for name, session in sessions.items()}
    times = in_turns(calls, rounds=4 * runs.rounds, clock=runs.clock)
    found = {name: Spread.of(times[name]) * MICRO for name in times}
    share = ratio(times, "found", "8 bits")
    result = evaluate(student, data.test_dataloader(), next(student.parameters()).device)
    weighted = [bits for name, bits in allocation.items() if not isinstance(student.get_submodule(name), Operand)]
    floats = [sum(pair[side] == FULL_PRECISION for pair in weighted) for side in (0, 1)]
    return {
        "predicted_us": told.total, "measured_us": found["found"].median, "measured_us_low": found["found"].low,
        "measured_us_high": found["found"].high, "int8_us": found["8 bits"].median,
        "fp_us": found["full precision"].median, "of_int8": share.median, "of_int8_low": share.low,
        "of_int8_high": share.high, "layers": len(weighted), "float_weights": floats[0], "float_inputs": floats[1],
        "top1": result.top1, "test_images": data.info.test_size, "wall_s": round(time.perf_counter() - start, 1),
    }  # fmt: skip


if __name__ == "__main__":
    logging.getLogger("qtrain").setLevel(logging.WARNING)
    sys.exit(main())
