"""Training a student on loaders of one's own, by a teacher or by labels alone; and the calls of a loop of one's own."""

import logging
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import nn

from qtrain.api.arguments import check_network
from qtrain.api.quantize import record_of
from qtrain.config.compose import compose
from qtrain.data.given import GivenLoaders, Pairs
from qtrain.models.identity import structure_digest, weights_digest
from qtrain.models.trial import logits_of, placed
from qtrain.nn.many_bits import in_use
from qtrain.nn.project import partition_weights_, project_weights_
from qtrain.pipeline.build_teacher import build_objective, build_teacher
from qtrain.pipeline.fit import fit
from qtrain.pipeline.many_bits import narrow_objective
from qtrain.pipeline.prepare import settle_for_target_
from qtrain.pipeline.run_lock import only_run_in
from qtrain.quantizers.hooks import begin_step_ as begin_quantizers_step_
from qtrain.settings.run_identity import hash_of
from qtrain.settings.run_settings import RunSettings
from qtrain.training.evaluation import evaluate
from qtrain.training.module import QATModule
from qtrain.utils.checks import check_writable
from qtrain.utils.copies import copied

log = logging.getLogger(__name__)

FINE_TUNING = 0.01
"""Learning rate of SGD for weights that are trained already; the command line's default is for longer trainings."""

BEGUN = "qtrain_begun"
"""The attribute by which a student remembers how it was when a training of it began that has not ended."""


def distill(
    student: nn.Module,
    train_loader: Pairs,
    *,
    teacher: nn.Module | None = None,
    val_loader: Pairs | None = None,
    epochs: int = 3,
    lr: float | None = None,
    objective: str | None = None,
    callbacks: Sequence[pl.Callback] = (),
    folder: str | Path | None = None,
    seed: int = 0,
    options: Sequence[str] = (),
) -> dict[str, float]:
    """Train ``student`` in place, by the fit of the command line; it is left on its device, in eval mode.

    ``train_loader`` yields (image, label): (N, C, H, W) float, normalized, and (N,) int64. With a ``teacher``, a
    network for the same images, the objective is labels and the teacher's softened outputs, otherwise labels alone; or
    ``objective`` names another of ``conf/objective``. ``lr`` is the optimizer's learning rate, 0.01 for SGD.
    ``callbacks`` are Lightning's. ``options`` are overrides as on the command line, for instance
    ``["optimizer=adamw", "distill.temperature=2"]``.

    Of a student of many bits each step trains all widths, the narrow ones by ``many_bits.objective`` with the widest as
    their teacher; ``top1`` is that of the width in use.

    With a ``folder`` metrics and resume points are kept there: the same call goes on where a former one was killed, and
    ends with the same student. A folder of another student, teacher or choice of options is refused. Returns ``top1``
    in percent and ``loss`` on ``val_loader`` after the last epoch, if there is one. Raises ``ValueError`` in one line
    for a loader that yields something else, a teacher that does not take the loader's images or has other classes, or
    an option that does not exist.

    >>> import torch, qtrain
    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> images, labels = torch.rand(32, 1, 8, 8), torch.randint(3, (32,))
    >>> loader = DataLoader(TensorDataset(images, labels), batch_size=16, shuffle=True)
    >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    >>> student = qtrain.quantize(network, images)
    >>> sorted(qtrain.distill(student, loader, teacher=network, val_loader=loader, epochs=1))
    ['loss', 'top1']
    """
    overrides = [f"objective={objective or ('hard' if teacher is None else 'soft')}", f"fit.epochs={epochs}"]
    if lr is None and not any(option.startswith("optimizer") for option in options):
        lr = FINE_TUNING
    overrides += [f"seed={seed}", *([] if lr is None else [f"optimizer.lr={lr}"])]
    settings = compose([*overrides, *options])
    check_network("distill: student", student)
    if teacher is not None:
        check_network("distill: teacher", teacher)
    data = GivenLoaders(train_loader, val_loader, num_classes=_classes(student), seed=seed)
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()) if folder is None else folder)
        if folder is not None:
            check_writable(place, "distill: folder")
            if getattr(train_loader, "persistent_workers", False):
                log.warning(
                    "distill: workers that persist draw on from epoch to epoch, so a training that is continued has "
                    "other random numbers than one that was not killed; persistent_workers=False has the same"
                )
            stack.enter_context(only_run_in(place))
        stack.enter_context(torch.random.fork_rng())
        torch.manual_seed(seed)
        _check_images(in_use(student), data)
        student.train()  # Lightning leaves modes as they are
        # A copy: a teacher is put into eval mode, on the device and in the precision of the fit.
        frozen = None if teacher is None else copied(teacher).float()
        if frozen is not None:
            _check_teacher(frozen, settings, data)
        terms = build_objective(settings, in_use(student), frozen, data)
        module = QATModule(
            student=student,
            objective=terms,
            teacher=None if frozen is None else build_teacher(settings, frozen, terms, data),
            optimizer=settings.optimizer.build(),
            lr_schedule=settings.lr_schedule.build(),
            num_classes=data.info.num_classes,
            seed=seed,
            scale_lr=settings.fit.scale_lr,
            norm_decay=settings.fit.norm_decay,
            compile=settings.fit.compile is True,
            narrow_objective=narrow_objective(settings, student, data),
        )
        result = fit(
            settings,
            module=module,
            data=data,
            folder=place,
            # Without a folder nothing goes on with this training.
            identity="" if folder is None else _identity(settings, student, frozen, len(train_loader)),
            epochs=epochs,
            title=type(student).__name__,
            command="the same call of qtrain.distill",
            trial_callbacks=callbacks,
        )
    vars(student).pop(BEGUN, None)
    student.eval()
    if record_of(student).for_target:
        settle_for_target_(student)
    validation = data.val_dataloader()
    return {} if isinstance(validation, list) else evaluate(student, validation, result.device).metrics


def _identity(settings: RunSettings, student: nn.Module, teacher: nn.Module | None, batches: int) -> str:
    """What a training must have in common with the one that it goes on with: options, networks, length of the epoch.

    The student is known by how it was when a training of it began, which it remembers until that has ended.
    """
    if BEGUN not in vars(student):
        setattr(student, BEGUN, _digest(student))
    what = {
        "settings": settings.identity,
        "student": getattr(student, BEGUN),
        "teacher": None if teacher is None else _digest(teacher),
        "batches": batches,
    }
    return hash_of(what, ignore=())


def _digest(network: nn.Module) -> str:
    return f"{weights_digest(network)} {structure_digest(network)}"


@torch.no_grad()
def begin_step_(student: nn.Module, *, step: int, steps: int, seed: int = 0) -> None:
    """Tell the student's quantizers that training step number ``step`` of ``steps`` begins; before the forward.

    Schedules follow it, and so do random draws: they are a function of (``seed``, ``step``), so that a loop that goes
    on at a step draws what it would have drawn. With LSQ, PACT and other quantizers that know no step nothing happens.

    >>> import torch, qtrain
    >>> student = qtrain.quantize(torch.nn.Sequential(torch.nn.Linear(4, 4)), torch.rand(2, 4))
    >>> optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    >>> for step in range(3):
    ...     qtrain.begin_step_(student.train(), step=step, steps=3)
    ...     student(torch.rand(2, 4)).square().mean().backward()
    ...     optimizer.step()
    ...     qtrain.project_(student)
    """
    if not 0 <= step < max(1, steps):
        raise ValueError(f"begin_step_: step must be in 0..{steps - 1}, got {step}; count all steps of the training")
    begin_quantizers_step_(student, seed=seed, step=step, progress=step / max(1, steps))
    partition_weights_(student)


def project_(student: nn.Module) -> None:
    """After an optimizer step: move the weights whose quantizers ask for it, such as binary ones, which are clipped.

    See :func:`begin_step_` for a loop.
    """
    project_weights_(student)


def _classes(student: nn.Module) -> int:
    """How many logits ``student`` gives."""
    example = placed(torch.zeros(1, *record_of(student).size), student)
    return int(logits_of(student, example, where="distill: student").shape[1])


def _check_images(student: nn.Module, data: GivenLoaders) -> None:
    """Raise ``ValueError`` unless ``student`` takes the images of both loaders."""
    own = next((p.dtype for p in student.parameters() if p.is_floating_point()), torch.float32)
    for what, example in zip(("the loader", "val_loader"), data.examples, strict=False):
        if example.dtype == torch.float64 != own:
            raise ValueError(f"distill: images of {what} have 64 bits, the student's numbers 32; give images.float()")
        logits_of(student, placed(example, student), where=f"distill: images of {what}", classes=data.info.num_classes)


def _check_teacher(teacher: nn.Module, settings: RunSettings, data: GivenLoaders) -> None:
    """Raise ``ValueError`` unless ``teacher`` takes the loader's images, and has the student's classes if that counts.

    In training it gets floats of 32 bits whatever its own are, on a GPU under autocast.
    """
    compared = settings.objective.build().compares_logits
    first = next(teacher.parameters(), torch.zeros(()))
    with torch.autocast(first.device.type, dtype=torch.bfloat16, enabled=torch.cuda.is_available()):
        logits_of(
            teacher,
            data.example.float().to(first.device),
            where="distill: teacher",
            classes=data.info.num_classes if compared else None,
            hint="its classes must be the student's",
        )
