"""Full-precision weights that an experiment needs and does not name are trained once, and kept.

They are kept under a key of all that they depend on (data, model, recipe, seed), so that the next run, and the next
experiment with the same teacher, find them.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from qtrain.config.instantiate import instantiate
from qtrain.data.base import VisionData
from qtrain.distill.hard import Hard
from qtrain.distill.objective import Objective
from qtrain.pipeline.build_model import build_model
from qtrain.pipeline.fit import fit, shares_batches
from qtrain.pipeline.results import config_hash
from qtrain.pipeline.run_folder import save_weights
from qtrain.pipeline.run_lock import only_run_in
from qtrain.training.module import QATModule
from qtrain.training.ranks import wait_for_all
from qtrain.utils.errors import ConfigError

log = logging.getLogger(__name__)


def trained_model(node: DictConfig, cfg: DictConfig, data: VisionData) -> nn.Module:
    """The full-precision model of ``node`` with its own weights or :func:`full_precision_weights`.

    Of an ensemble (``node.members``) that goes for each member.
    """
    if "members" not in node:
        return build_model(node, data.info, weights=full_precision_weights(node, cfg, data))
    members = {str(name): trained_model(member, cfg, data) for name, member in node.members.items()}
    try:
        ensemble: nn.Module = instantiate(node, members=members)()
    except ValueError as error:
        raise ConfigError(f"{node._get_full_key(None)}: {error}") from error
    return ensemble


def full_precision_weights(node: DictConfig, cfg: DictConfig, data: VisionData) -> str | None:
    """Path of weights for the model of ``node``; ``None`` where the node brings its own.

    ``cfg.full_precision`` says how they are trained and where they are kept. An interrupted training goes on where it
    stopped.
    """
    if node.get("weights") is not None or node.get("pretrained", False):
        return None
    key, kept = _kept(node, cfg, data)
    if kept.is_file():
        log.info("full-precision %s: found %s", node.name, kept)
        return str(kept)
    # Jobs that start together, an array's for instance, need the same weights: one trains them, the others wait.
    with only_run_in(kept.parent, wait_until=kept.is_file):
        if not kept.is_file():
            _train(node, cfg, data, kept.parent, kept, identity=key)
    return str(kept)


def must_train(node: DictConfig, cfg: DictConfig, data: VisionData) -> bool:
    """Whether :func:`full_precision_weights` would begin with hours of training."""
    own = node.get("weights") is not None or node.get("pretrained", False)
    return not own and not _kept(node, cfg, data)[1].is_file()


def _kept(node: DictConfig, cfg: DictConfig, data: VisionData) -> tuple[str, Path]:
    """The key of weights for the model of ``node``, and the file where they are or will be."""
    recipe = cfg.full_precision
    depends_on = {
        "model": OmegaConf.to_container(node, resolve=True),
        "data": OmegaConf.to_container(cfg.data, resolve=True),
        "recipe": {k: OmegaConf.to_container(recipe, resolve=True)[k] for k in ("epochs", "optimizer", "lr_schedule")},  # type: ignore[index,call-overload]
        "seed": cfg.seed,
    }
    key = config_hash(depends_on)
    return key, Path(recipe.folder).expanduser() / f"{data.info.name}-{node.name}-{key}" / "model.safetensors"


def _train(node: DictConfig, cfg: DictConfig, data: VisionData, folder: Path, kept: Path, *, identity: str) -> None:
    recipe = cfg.full_precision
    log.info("full-precision %s: no weights; training %d epochs, to be kept in %s", node.name, recipe.epochs, folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        model = build_model(node, data.info)
    if cfg.fit.channels_last:
        model.to(memory_format=torch.channels_last)
    module = QATModule(
        student=model,
        objective=Objective(terms={"hard": Hard()}),
        teacher=None,
        optimizer=instantiate(recipe.optimizer),
        lr_schedule=instantiate(recipe.lr_schedule),
        num_classes=data.info.num_classes,
        seed=cfg.seed,
        compile=cfg.fit.compile,
        sync_batchnorm=shares_batches(cfg),
    )
    title = f"full-precision {node.name}"
    plain = cfg.copy()
    plain.callbacks = None  # they are about the student
    fit(plain, module=module, data=data, folder=folder, identity=identity, epochs=recipe.epochs, title=title)
    save_weights(model, kept)
    wait_for_all()
