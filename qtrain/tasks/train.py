"""Floor 6: the task that makes a low-bit student: load, convert, calibrate, distil, evaluate, record."""

from __future__ import annotations

import copy
import logging
import shlex
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from pytorch_lightning.utilities import rank_zero_only
from torch import nn

from qtrain.cost.count import count
from qtrain.data.base import VisionData
from qtrain.distill.objective import Objective
from qtrain.lit.callbacks.batchnorm import reestimate_batchnorm
from qtrain.lit.evaluation import evaluate
from qtrain.lit.loggers import close
from qtrain.lit.module import QATModule
from qtrain.tasks import prepare, record
from qtrain.tasks.fit import Fitted, fit
from qtrain.tasks.instantiate import instantiate
from qtrain.tasks.pretrain import full_precision_weights
from qtrain.tasks.summary import FINISHED
from qtrain.tasks.table import print_summary
from qtrain.tasks.targets import ConfigError

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> dict[str, Any]:
    """Train one student; returns ``top1``, ``fp_top1`` and ``ptq_top1`` in percent (``None`` without a final test).

    A finished run of the same config is not repeated, only shown.
    """
    folder = Path(cfg.run_dir)
    if (finished := record.claim_folder(cfg, folder)) is not None:
        log.info("%s is finished; overwrite=true runs it again", folder)
        print_summary(folder.parent)
        return {"top1": finished.top1, "fp_top1": finished.fp_top1, "ptq_top1": finished.ptq_top1}
    start = time.perf_counter()
    torch.manual_seed(cfg.seed)

    data = prepare.load_data(cfg)
    prepare.rehearse(cfg, data)
    # A full-precision run starts from what its config names, a quantised one from trained weights in any case.
    weights = full_precision_weights(cfg.model, cfg, data) if cfg.quantize.enabled else None
    full_precision = prepare.build_model(cfg.model, data, weights=weights)
    prepared = prepare.quantise(cfg, copy.deepcopy(full_precision), data)
    student = prepared.student
    calibrated = copy.deepcopy(student) if prepared.allocation else None
    teacher_model = _teacher_model(cfg, data)
    objective = prepare.build_objective(cfg, student, teacher_model, data)
    cost = count(student, prepare.example_input(data))
    log.info(
        "%s: %.1f kB, in full precision %.1f kB; %.2f bits per weight",
        folder.name, cost.size_bytes / 1e3, cost.fp_size_bytes / 1e3, cost.effective_bits,
    )  # fmt: skip

    fitted = _fit(cfg, student, teacher_model, objective, data, folder)
    if cfg.fit.reestimate_bn:
        _reestimate_batchnorm(cfg, student.to(fitted.device), data, fitted.device)
    metrics: dict[str, Any] = {"top1": None, "fp_top1": None, "ptq_top1": None}
    if cfg.fit.final_test:
        for name, model in {"fp_top1": full_precision, "ptq_top1": calibrated, "top1": student}.items():
            if model is not None:
                metrics[name] = evaluate(model, data.test_dataloader(), fitted.device)["top1"]
    described = record.describe(cfg, data.info, prepared.allocation, cost)
    _record(
        cfg,
        folder,
        student,
        {**described, **metrics},
        objective,
        fitted,
        wall_s=time.perf_counter() - start + fitted.earlier_s,
    )
    return metrics


def _reestimate_batchnorm(cfg: DictConfig, student: nn.Module, data: VisionData, device: torch.device) -> None:
    """From images augmented as in training, of the epoch that would come next.

    Images without augmentation have other statistics (no black edges): on CIFAR-10 that costs over two points.
    """
    loader = data.train_dataloader()
    loader.set_epoch(cfg.fit.epochs)
    images = (batch.image.to(device) for batch in islice(loader, cfg.fit.reestimate_bn))
    reestimate_batchnorm(student, images)


def _teacher_model(cfg: DictConfig, data: VisionData) -> nn.Module | None:
    node = cfg.teacher.model
    if node is None:
        return None
    if "_target_" not in node:
        raise ConfigError(
            "teacher.model: has options but names no model; take teacher=cifar_resnet56, or another of that group"
        )
    return prepare.build_model(node, data, weights=full_precision_weights(node, cfg, data))


def _fit(
    cfg: DictConfig,
    student: nn.Module,
    teacher_model: nn.Module | None,
    objective: Objective,
    data: VisionData,
    folder: Path,
) -> Fitted:
    teacher = None
    if teacher_model is not None and objective.needs_teacher:
        teacher = prepare.build_teacher(cfg, teacher_model, objective, data)
    module = QATModule(
        student=student,
        objective=objective,
        teacher=teacher,
        optimizer=instantiate(cfg.optimizer),
        lr_schedule=instantiate(cfg.lr_schedule),
        num_classes=data.info.num_classes,
        seed=cfg.seed,
        scale_lr=cfg.fit.scale_lr,
        norm_decay=cfg.fit.norm_decay,
        compile=cfg.fit.compile,
    )
    # A logger's maker may decide that there is nothing to log to (no wandb, mode=disabled).
    made = [make(folder=folder, config=record.plain_config(cfg)) for make in instantiate(cfg.logger).values()]
    loggers = tuple(logger for logger in made if logger is not None)
    failed = True
    try:
        fitted = fit(
            cfg,
            module=module,
            data=data,
            folder=folder,
            identity=record.identity_of(cfg),
            epochs=cfg.fit.epochs,
            title=folder.name,
            loggers=loggers,
            command="python -m qtrain " + shlex.join(sys.argv[1:]),
        )
        failed = False
    finally:
        close(loggers, failed=failed)
    return fitted


@rank_zero_only
def _record(
    cfg: DictConfig,
    folder: Path,
    student: nn.Module,
    summary: dict[str, Any],
    objective: Objective,
    fitted: Fitted,
    *,
    wall_s: float,
) -> None:
    record.save_weights(student, folder / record.STUDENT)
    summary |= {
        "name": folder.name,
        "distill": "+".join(objective.teacher_terms) or "none",
        "epochs": cfg.fit.epochs,
        "step_ms": 1e3 * fitted.train_s / max(1, fitted.steps),
        "wall_s": wall_s,
        "status": FINISHED if cfg.fit.final_test else "not tested",
    }
    notes = f"budget={cfg.budget}, lr={cfg.optimizer.get('lr')}" + (", resumed" if fitted.resumed else "")
    record.append_results(cfg, folder, summary, device=fitted.device, notes=notes)
    record.finish(folder, summary)
    print_summary(folder.parent)
