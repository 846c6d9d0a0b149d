"""Stops the run when the loss is NaN or infinite, and names the layer where that began.

On a CPU the loss is checked before the backward, so the weights are still those that produced it. On a GPU reading the
loss would wait for the device, so a flag is kept there and read at intervals.
"""

from contextlib import ExitStack
from typing import Any, final

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from qtrain.training.student import student_of


class NonFiniteLossError(ValueError):
    """The training loss became NaN or infinite."""


_IMAGES = "input images"
_REMEDY_OF_IMAGES = "look for the image, and for a deviation of zero in its normalization"
_REMEDY = "lower the learning rate, clip gradients (fit.clip_norm=1.0) or add warm-up"


def first_non_finite(model: nn.Module, image: Tensor) -> str | None:
    """The first value in ``model`` that is not finite, in the order of the forward of ``image`` (N, C, H, W).

    It is ``"input images"``, or the qualified name of a module with ``parameter NAME``, ``buffer NAME`` or ``output``;
    ``None`` if all values are finite. The forward runs eagerly and without gradient, and changes running statistics of
    modules in training mode.
    """
    if not torch.isfinite(image).all():
        return _IMAGES
    found: list[str] = []

    def before(name: str, module: nn.Module) -> None:
        if found:
            return
        owned: list[tuple[str, str, Tensor]] = [("parameter", *item) for item in module.named_parameters(recurse=False)]
        owned += [("buffer", *item) for item in module.named_buffers(recurse=False)]
        found.extend(f"{name}: {kind} {key}" for kind, key, tensor in owned if not _all_finite(tensor))

    def after(name: str, output: Any) -> None:
        if not found and isinstance(output, Tensor) and not _all_finite(output):
            found.append(f"{name}: output")

    with ExitStack() as hooks, torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for name, module in model.named_modules():
            name = name or "model"
            hooks.enter_context(module.register_forward_pre_hook(lambda m, args, name=name: before(name, m)))
            hooks.enter_context(module.register_forward_hook(lambda m, args, out, name=name: after(name, out)))
        model(image)
    return found[0] if found else None


@final
class StopOnNonFinite(pl.Callback):
    """Raises ``NonFiniteLossError`` when the loss is NaN or infinite, naming the first layer that is not finite.

    On a GPU the losses of the last ``every_n_steps`` steps are checked together, with no wait in between. The layer is
    then found with the current weights.
    """

    def __init__(self, *, every_n_steps: int = 50) -> None:
        super().__init__()
        if every_n_steps < 1:
            raise ValueError(f"StopOnNonFinite: every_n_steps must be at least 1, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self._image: Tensor | None = None
        self._bad: Tensor | None = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._image = batch[0]

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        bad = ~torch.isfinite(loss.detach())
        if loss.device.type != "cpu":
            self._bad = bad if self._bad is None else self._bad | bad
            if (trainer.global_step + 1) % self.every_n_steps != 0:
                return
            bad, self._bad = self._bad, None
        if bool(bad):
            self._stop(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Before the resume point at the end of the epoch, which must not hold a broken model.
        if self._bad is not None and bool(self._bad):
            self._stop(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._image = None

    def _stop(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._image is not None
        where = first_non_finite(student_of(pl_module), self._image) or "the loss itself (the student is finite)"
        raise NonFiniteLossError(
            f"StopOnNonFinite: the loss is not finite at step {trainer.global_step} (epoch {trainer.current_epoch}); "
            f"first non-finite value in forward order: {where}; {_REMEDY_OF_IMAGES if where == _IMAGES else _REMEDY}"
        )


def _all_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
