"""Balances the terms of the objective by the norms of their gradients.

Losses have different units, so a weight of 0.5 says little about a term's influence on a step. The gradient decides
that, as in GradNorm (Chen et al. 2018, arXiv 1711.02257), which learns weights for equal norms. Here the norms are
measured at intervals, and the factors that make them equal are computed directly.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, final

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from qtrain.functional.ranks import mean_of_ranks
from qtrain.models.sharding import is_sharded
from qtrain.tracking.metric_log import MetricLog
from qtrain.training.module import QATModule
from qtrain.training.student import student_of
from qtrain.utils.checks import check_range


def gradient_norms(losses: Mapping[str, Tensor], parameters: list[nn.Parameter]) -> dict[str, Tensor]:
    """The Euclidean norm of each loss's gradient with respect to all ``parameters``, 0-dim float32.

    The gradient is the mean over all ranks, which must all call this together. Penalties that quantizers add in the
    backward do not depend on the loss and are subtracted. The graph of ``losses`` is kept; ``.grad`` of the parameters
    is not changed.
    """
    norms = {}
    for name, loss in losses.items():
        added = _gradient(0 * loss, parameters)  # the penalties of those quantizers that this loss depends on
        parts = [g.float() - a.float() for g, a in zip(_gradient(loss, parameters), added, strict=True)]
        norms[name] = mean_of_ranks(torch.cat([part.flatten() for part in parts])).norm()
    return norms


def balance_of(norms: Tensor, reference: int, limit: float) -> Tensor:
    """``norms[reference] / norms`` within [1 / limit, limit]; these factors make all norms that of the reference."""
    return (norms[reference] / norms.clamp(min=torch.finfo(norms.dtype).tiny)).clamp(1 / limit, limit)


@final
class GradientBalance(pl.Callback):
    """After steps 1, 1 + n, 1 + 2n, ... sets ``objective.balance`` so that unit weights give equal gradient norms.

    With g_i the norm of term i's unweighted gradient with respect to the student, and G_i its running mean,
    ``G_i <- decay G_i + (1 - decay) g_i``, the balance is ``b_i = G_reference / G_i``. Term i then contributes
    ``weight_i b_i g_i``, so the weights and their schedules are the proportions of the gradients. ``reference`` keeps
    its size; ``None`` is the first term.

    Norms are measured on the batch of the step, in training mode, by an eager pass with two backwards for each term.
    Statistics of batch norm and quantizers, and random numbers, are restored afterwards. The means are in the resume
    point, and ``train/balance/<term>`` goes to ``metric_log``. The objective of a learning teacher is not balanced.
    """

    def __init__(
        self,
        *,
        metric_log: MetricLog,
        every_n_steps: int = 100,
        decay: float = 0.9,
        reference: str | None = None,
        limit: float = 1e4,
    ) -> None:
        super().__init__()
        check_range("GradientBalance", "[1, inf)", every_n_steps=every_n_steps)
        check_range("GradientBalance", "[0, 1)", decay=decay, hint="0 keeps the last measurement only")
        check_range("GradientBalance", "[1, inf)", limit=limit, hint="1 changes nothing")
        self.metric_log = metric_log
        self.every_n_steps = every_n_steps
        self.decay = decay
        self.reference = reference
        self.limit = limit
        self._means: dict[str, float] = {}
        self._step = 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if is_sharded(student_of(pl_module)):
            raise ValueError("GradientBalance: needs the gradients of all weights on each process; set fit.shard=false")
        terms = _terms(pl_module)
        if self.reference is not None and self.reference not in terms:
            raise ValueError(
                f"GradientBalance: reference {self.reference!r} is no term of the objective; take one of "
                f"{', '.join(terms)}, or null for the first"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._means:  # restored
            self._set_(pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._step or (step - 1) % self.every_n_steps != 0:
            return
        self._step = step
        assert isinstance(pl_module, QATModule)
        parameters = [parameter for parameter in pl_module.student.parameters() if parameter.requires_grad]
        with _no_trace(pl_module), trainer.precision_plugin.train_step_context():
            losses = pl_module.losses(batch)
            norms = gradient_norms({name: losses[name] for name in _terms(pl_module)}, parameters)
        measured = torch.stack(list(norms.values()))
        if not torch.isfinite(measured).all():
            return  # StopOnNonFinite stops the run, or a loss scaler skips the step
        for name, norm in zip(norms, measured.tolist(), strict=True):
            before = self._means.get(name, norm)
            self._means[name] = self.decay * before + (1 - self.decay) * norm
        balance = self._set_(pl_module)
        self.metric_log.write(trainer, {f"train/balance/{name}": value for name, value in balance.items()})

    def _set_(self, pl_module: pl.LightningModule) -> dict[str, float]:
        assert isinstance(pl_module, QATModule)
        terms = _terms(pl_module)
        means = torch.tensor([self._means[name] for name in terms])
        balance = balance_of(means, terms.index(self.reference or terms[0]), self.limit)
        pl_module.objective.balance.copy_(balance)
        return dict(zip(terms, balance.tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        return {"means": dict(self._means), "step": self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._means = {str(name): float(mean) for name, mean in state_dict["means"].items()}
        self._step = int(state_dict["step"])


def _gradient(loss: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def _terms(pl_module: pl.LightningModule) -> list[str]:
    assert isinstance(pl_module, QATModule)
    return list(pl_module.objective.terms)


@contextmanager
def _no_trace(module: pl.LightningModule) -> Iterator[None]:
    """Inside, code runs eagerly; afterwards every buffer of ``module`` and the random numbers are restored."""
    kept = [(buffer, buffer.clone()) for buffer in module.buffers()]
    devices = [module.device] if module.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"), torch.enable_grad():
        yield
    with torch.no_grad():
        for buffer, value in kept:
            buffer.copy_(value)
