"""Full-precision weights that an experiment needs and does not name are trained once, and kept.

They are kept under a key of all that they depend on (data, model, recipe, seed), so that the next run, and the next
experiment with the same teacher, find them.
"""

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from qtrain.data.base import VisionData
from qtrain.distillation.hard import Hard
from qtrain.distillation.objective import Objective
from qtrain.models.identity import architecture_digest
from qtrain.models.normalization import Normalization, normalization
from qtrain.models.weight_file import metadata_of
from qtrain.pipeline.build_model import build_model, builder_of, has_weights
from qtrain.pipeline.fit import fit, shares_batches
from qtrain.pipeline.memory_format import settle_memory_format_
from qtrain.pipeline.run_lock import only_run_in
from qtrain.pipeline.student_file import save_weights
from qtrain.settings.component import Component
from qtrain.settings.run_identity import comparable, hash_of
from qtrain.settings.run_settings import RunSettings
from qtrain.training.module import QATModule
from qtrain.training.ranks import wait_for_all
from qtrain.utils.checks import check_writable
from qtrain.utils.errors import as_config_error

log = logging.getLogger(__name__)

OF_THE_FILE = ("state", "keys", "mean", "std")
"""Options of a model that say how to read a file of weights. A network that is trained here does not depend on them."""

OF_THE_PLACE = ("root", "eval_batch_size", "device")
"""Options of data that say where images lie; weights depend on what they are."""


def trained_model(chosen: Component, settings: RunSettings, data: VisionData) -> nn.Module:
    """The teacher ``chosen``, or each member of it, with its own weights or :func:`full_precision_weights`."""

    def build(one: Component) -> nn.Module:
        seen = normalization(settings.teacher.mean, settings.teacher.std)
        return build_model(one, data.info, weights=full_precision_weights(one, settings, data), seen=seen)

    return of_members(chosen, build)


def of_members(chosen: Component, build: Callable[[Component], nn.Module]) -> nn.Module:
    """The teacher ``chosen`` as ``build`` makes it; of an ensemble (option ``members``) that goes for each member."""
    members = members_of(chosen)
    if not members:
        return build(chosen)
    models = {name: of_members(member, build) for name, member in members.items()}
    with as_config_error(chosen.key):
        ensemble: nn.Module = chosen.build(members=models)()
    return ensemble


def members_of(chosen: Component) -> Mapping[str, Component]:
    """The members of an ensemble by name; none for a single model."""
    members: Mapping[str, Component] = chosen.get("members", {})
    return members


def teacher_weights(settings: RunSettings, data: VisionData) -> list[str | None]:
    """The files of the teacher's weights, or of its members'; ``None`` for one that a package brings along."""
    chosen = settings.teacher.model
    if chosen is None:
        return []
    members = list(members_of(chosen).values()) or [chosen]
    return [member.get("weights") or full_precision_weights(member, settings, data) for member in members]


def full_precision_weights(chosen: Component, settings: RunSettings, data: VisionData) -> str | None:
    """Path of weights for the model ``chosen``; ``None`` where it brings its own.

    ``settings.full_precision`` says how they are trained and where they are kept. An interrupted training goes on
    where it stopped.
    """
    if has_weights(chosen):
        return None
    key, kept = _kept(chosen, settings, data)
    if kept.is_file():
        log.info("full-precision %s: found %s", chosen.name, kept)
        return str(kept)
    check_writable(kept.parent, "full_precision.folder")
    # Jobs that start together, an array's for instance, need the same weights: one trains them, the others wait.
    with only_run_in(kept.parent, wait_until=kept.is_file):
        if not kept.is_file():
            _train(chosen, settings, data, kept.parent, kept, identity=key)
    return str(kept)


def must_train(chosen: Component, settings: RunSettings, data: VisionData) -> bool:
    """Whether :func:`full_precision_weights` would begin with hours of training."""
    return not has_weights(chosen) and not _kept(chosen, settings, data)[1].is_file()


def _kept(chosen: Component, settings: RunSettings, data: VisionData) -> tuple[str, Path]:
    """The key of weights for the model ``chosen``, and the file where they are or will be."""
    recipe = settings.full_precision
    data_plain = {key: v for key, v in settings.data.plain.items() if not (key == "labeled" and recipe.all_labels)}
    depends_on = {
        "model": {key: value for key, value in chosen.plain.items() if key not in OF_THE_FILE},
        "data": {key: v for key, v in comparable({"data": data_plain})["data"].items() if key not in OF_THE_PLACE},
        # A folder may hold other images than those of the same name, or than it held before.
        "content": data.content(),
        "classes": [data.info.num_classes, *data.info.classes],
        "recipe": {key: settings.plain["full_precision"][key] for key in ("epochs", "optimizer", "lr_schedule")},
        "seed": settings.seed,
    }
    # Code of the user's own may change while the config stays as it is.
    if not builder_of(chosen).startswith("qtrain."):
        depends_on["architecture"] = _architecture(chosen, settings, data)
    key = hash_of(depends_on)
    return key, Path(recipe.folder).expanduser() / f"{data.info.name}-{chosen.name}-{key}" / "model.safetensors"


def _architecture(chosen: Component, settings: RunSettings, data: VisionData) -> str:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return architecture_digest(build_model(chosen, data.info))


def _train(
    chosen: Component, settings: RunSettings, data: VisionData, folder: Path, kept: Path, *, identity: str
) -> None:
    recipe = settings.full_precision
    log.info("full-precision %s: no weights; training %d epochs, to be kept in %s", chosen.name, recipe.epochs, folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = build_model(chosen, data.info)
    settle_memory_format_(settings, model, data)
    module = QATModule(
        student=model,
        objective=Objective(terms={"hard": Hard()}),
        teacher=None,
        optimizer=recipe.optimizer.build(),
        lr_schedule=recipe.lr_schedule.build(),
        num_classes=data.info.num_classes,
        seed=settings.seed,
        compile=settings.fit.compile is True,  # auto: a step in full precision gains nothing
        sync_batchnorm=shares_batches(settings),
    )
    title = f"full-precision {chosen.name}"
    # Callbacks and accumulated gradients are about the student.
    alone = replace(settings, callbacks={}, trainer=settings.trainer.with_options(accumulate_grad_batches=1))
    seen = data.with_all_labels() if recipe.all_labels else copy.copy(data)
    seen.train_on_labels_only(True)
    fit(alone, module=module, data=seen, folder=folder, identity=identity, epochs=recipe.epochs, title=title)
    save_weights(model, kept, metadata=metadata_of(Normalization(data.info.mean, data.info.std)))
    wait_for_all()
