"""The task that makes a low-bit student without training it: post-training quantization."""

from __future__ import annotations

import copy
import logging
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from qtrain.cost.count import count
from qtrain.data.image_grid import keep_picture
from qtrain.pipeline import prepare, run_folder
from qtrain.pipeline.build_model import build_model, example_input
from qtrain.pipeline.claim import claimed
from qtrain.pipeline.load_data import load_data
from qtrain.pipeline.summary import FINISHED
from qtrain.report.table import print_summary
from qtrain.training.evaluation import evaluate
from qtrain.utils.errors import ConfigError

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> dict[str, Any]:
    """Convert, calibrate, correct and round as ``cfg.quantize`` says; returns ``top1`` and ``fp_top1`` in percent.

    A finished run of the same config is not repeated, only shown. Without a final test the metrics are ``None``. Raises
    ``ConfigError`` where there are no trained weights, nothing to quantize, or another run in the folder.
    """
    folder = Path(cfg.run_dir)
    with claimed(cfg, folder) as finished:
        if finished is not None:
            log.info("%s is finished; overwrite=true runs it again", folder)
            metrics: dict[str, Any] = {"top1": finished.top1, "fp_top1": finished.fp_top1}
        else:
            metrics = _calibrate(cfg, folder)
        print_summary(folder.parent)
    return metrics


def _calibrate(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    if not cfg.quantize.enabled:
        raise ConfigError("quantize.enabled: task=calibrate quantizes; task=evaluate measures full precision")
    if cfg.model.get("weights") is None and not cfg.model.get("pretrained", False):
        raise ConfigError("model.weights: calibration needs a trained model; give a file, or model.pretrained=true")
    start = time.perf_counter()
    torch.manual_seed(cfg.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = load_data(cfg, test_only=not prepare.needs_images(cfg))
    keep_picture(data, folder)
    full_precision = build_model(cfg.model, data.info)
    prepared = prepare.quantize(cfg, copy.deepcopy(full_precision).to(device), data)
    seconds = time.perf_counter() - start
    log.info("calibrated in %.0f s", seconds)
    metrics: dict[str, Any] = {"top1": None, "fp_top1": None}
    if cfg.fit.final_test:
        for name, model in {"fp_top1": full_precision, "top1": prepared.student}.items():
            metrics[name] = evaluate(model, data.test_dataloader(), device)["top1"]
    cost = count(prepared.student.cpu(), example_input(data.info))
    summary = run_folder.describe(cfg, data.info, prepared.allocation, cost) | metrics
    summary |= {
        "name": folder.name,
        "distill": "none",
        "epochs": 0,
        "wall_s": seconds,
        "status": FINISHED if cfg.fit.final_test else "not tested",
    }
    run_folder.save_weights(prepared.student, folder / run_folder.STUDENT)
    run_folder.append_results(cfg, folder, summary, device=device, notes="calibrated only")
    run_folder.finish(folder, summary)
    return metrics
