"""Floor 6: the task that makes a low-bit student without training it: post-training quantization."""

from __future__ import annotations

import copy
import logging
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from qtrain.cost.count import count
from qtrain.lit.evaluation import evaluate
from qtrain.tasks import prepare, record
from qtrain.tasks.build import build_model, example_input
from qtrain.tasks.load import load_data
from qtrain.tasks.picture import keep_picture
from qtrain.tasks.summary import FINISHED
from qtrain.tasks.table import print_summary
from qtrain.tasks.targets import ConfigError

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> dict[str, Any]:
    """Convert, calibrate, correct and round as ``cfg.quantize`` says; returns ``top1`` and ``fp_top1`` in percent.

    A finished run of the same config is not repeated, only shown. Without a final test the figures are ``None``.
    """
    folder = Path(cfg.run_dir)
    if (finished := record.claim_folder(cfg, folder)) is not None:
        log.info("%s is finished; overwrite=true runs it again", folder)
        print_summary(folder.parent)
        return {"top1": finished.top1, "fp_top1": finished.fp_top1}
    if not cfg.quantize.enabled:
        raise ConfigError("quantize.enabled: task=calibrate quantises; task=evaluate tells full precision's accuracy")
    if cfg.model.get("weights") is None and not cfg.model.get("pretrained", False):
        raise ConfigError("model.weights: calibration needs a trained model; give a file, or model.pretrained=true")
    start = time.perf_counter()
    torch.manual_seed(cfg.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = load_data(cfg, test_only=not prepare.needs_images(cfg))
    keep_picture(data, folder)
    full_precision = build_model(cfg.model, data.info)
    prepared = prepare.quantise(cfg, copy.deepcopy(full_precision).to(device), data)
    seconds = time.perf_counter() - start
    log.info("calibrated in %.0f s", seconds)
    metrics: dict[str, Any] = {"top1": None, "fp_top1": None}
    if cfg.fit.final_test:
        for name, model in {"fp_top1": full_precision, "top1": prepared.student}.items():
            metrics[name] = evaluate(model, data.test_dataloader(), device)["top1"]
    cost = count(prepared.student.cpu(), example_input(data.info))
    summary = record.describe(cfg, data.info, prepared.allocation, cost) | metrics
    summary |= {
        "name": folder.name,
        "distill": "none",
        "epochs": 0,
        "wall_s": seconds,
        "status": FINISHED if cfg.fit.final_test else "not tested",
    }
    record.save_weights(prepared.student, folder / record.STUDENT)
    record.append_results(cfg, folder, summary, device=device, notes="calibrated only")
    record.finish(folder, summary)
    print_summary(folder.parent)
    return metrics
