"""The task that measures accuracy on the test images: of full-precision weights, or of a finished run's student."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from qtrain.cost.count import count
from qtrain.data.base import VisionData
from qtrain.models.weights import load_weights
from qtrain.pipeline import prepare, run_folder
from qtrain.pipeline.build_model import build_model, example_input
from qtrain.pipeline.load_data import load_data
from qtrain.pipeline.stages import last_stage
from qtrain.pipeline.summary import SUMMARY, read_summary
from qtrain.training.evaluation import evaluate
from qtrain.utils.errors import ConfigError

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> dict[str, Any]:
    """Evaluate the weights of ``model.weights``, or the student of ``checkpoint``; accuracies are in percent.

    ``checkpoint=RUN_FOLDER``, or the ``student.safetensors`` in it, evaluates that run's student as it was trained;
    model, quantizers and data are then those of the run, and the result is ``top1``. Otherwise the weights are
    evaluated in full precision, and the result is ``fp_top1``; task=calibrate quantizes them. Raises ``ConfigError``
    where there are no weights, or ``checkpoint`` is not a finished run.
    """
    start = time.perf_counter()
    trained = _run_folder(cfg.checkpoint)
    if trained is not None:
        cfg = _with_config_of(trained, cfg)
    elif cfg.model.get("weights") is None and not cfg.model.get("pretrained", False):
        raise ConfigError("model.weights: evaluate needs weights; give a file, or checkpoint=RUN_FOLDER")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Training images are opened only where mean and std have to be computed from them.
    data = load_data(cfg, test_only=trained is None and bool(cfg.data.get("mean")), synthesizes=False)
    if trained is None:
        student = prepare.Prepared(build_model(cfg.model, data.info), {})
    else:
        student = trained_student(cfg, trained, data)
    top1 = evaluate(student.student, data.test_dataloader(), device)["top1"]
    cost = count(student.student.cpu(), example_input(data.info))
    summary = run_folder.describe(cfg, data.info, student.allocation, cost) | _training_of(trained) | {"top1": top1}
    if trained is None:
        summary["fp_top1"] = top1
    summary["wall_s"] = time.perf_counter() - start
    folder = Path(cfg.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    notes = "full precision" if trained is None else "trained student"
    run_folder.append_results(cfg, folder, summary, device=device, notes=notes)
    weight, input = run_folder.typical_bits(student.allocation)
    what = f"W{weight}A{input}, trained student" if student.allocation else "full precision"
    print(f"{cfg.model.name}, {what}: {top1:.2f} %, {cost.size_bytes / 1e3:.1f} kB, {cost.compression:.1f}x smaller")
    return {"fp_top1" if trained is None else "top1": top1}


def trained_student(cfg: DictConfig, folder: Path, data: VisionData) -> prepare.Prepared:
    """The student that a run of ``cfg`` has left in ``folder``, converted as it was and with its weights."""
    model = build_model(cfg.model, data.info)
    allocation = prepare.convert(cfg, model, example_input(data.info)).allocation if cfg.quantize.enabled else {}
    load_weights(model, str(folder / run_folder.STUDENT))
    return prepare.Prepared(model, allocation)


def _run_folder(checkpoint: str | None) -> Path | None:
    if checkpoint is None:
        return None
    path = Path(checkpoint)
    folder = path.parent if path.is_file() else path
    for name in (run_folder.CONFIG, run_folder.STUDENT):
        if not (folder / name).is_file():
            raise ConfigError(
                f"checkpoint: {checkpoint} is no finished run: {folder / name} is not there; give the folder of a run, "
                "for instance outputs/quickstart/w4a4-distill"
            )
    return folder


def _training_of(folder: Path | None) -> dict[str, Any]:
    """How the evaluated weights were trained: as the run in ``folder`` says, or not at all."""
    if folder is None or not (folder / SUMMARY).is_file():
        return {"distill": "none", "epochs": 0}
    before = read_summary(folder / SUMMARY)
    return {"distill": before.distill, "epochs": before.epochs, "fp_top1": before.fp_top1}


def _with_config_of(folder: Path, cfg: DictConfig) -> DictConfig:
    """``cfg`` with model, data and quantizers of the run in ``folder``; those of its last stage, where it has some."""
    before = OmegaConf.load(folder / run_folder.CONFIG)
    assert isinstance(before, DictConfig)
    before = last_stage(before)
    merged = cfg.copy()
    for key in ("model", "data", "quantize", "experiment", "seed"):
        merged[key] = before[key]
    return merged
