"""Balance of terms: norms by another way, equal parts of a step, no trace of the measurement, exact resumption."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from qtrain.config.compose import compose
from qtrain.distillation.attention import Attention
from qtrain.distillation.hard import Hard
from qtrain.distillation.objective import Objective
from qtrain.distillation.soft import Soft
from qtrain.functional.ste import with_penalty
from qtrain.models.teacher import FrozenTeacher
from qtrain.run_task import run_task
from qtrain.schedules.constant import Constant
from qtrain.schedules.linear import Linear
from qtrain.spec import Batch
from qtrain.tracking.loggers import JsonlLogger
from qtrain.tracking.metric_log import MetricLog
from qtrain.training.callbacks.balance import GradientBalance, balance_of, gradient_norms
from qtrain.training.module import QATModule
from qtrain.utils.json_lines import read_metrics
from tests.helpers.graphs import counts_graphs
from tests.helpers.latent import latent_state


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(48, 5)
    )


def batches(count: int = 6) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    return [
        Batch(
            torch.randn(8, 1, 6, 6, generator=generator),
            torch.randint(0, 5, (8,), generator=generator),
            torch.arange(8) + 8 * i,
        )
        for i in range(count)
    ]


def module(*, compile: bool = False, lr: float = 0.1, dropout: bool = True) -> QATModule:
    """Labels, softened outputs and attention, whose gradients differ by orders of magnitude."""
    student = network(0)
    if not dropout:
        student[3] = nn.Identity()
    terms = {
        "hard": Hard(weight=0.5),
        "soft": Soft(weight=Linear(start=2.0, end=1.0), temperature=2.0),
        "attention": Attention(student_layers=["2"], weight=1.0),
    }
    objective = Objective(terms=terms)
    return QATModule(
        student=student,
        objective=objective,
        teacher=FrozenTeacher(network(1), names=objective.teacher_taps),
        optimizer=partial(torch.optim.SGD, lr=lr),
        lr_schedule=Constant(value=1.0),
        num_classes=5,
        seed=0,
        compile=compile,
    )


def fit(made: QATModule, folder: Path, *others: pl.Callback, **options: Any) -> list[dict[str, Any]]:
    """Six steps with :class:`GradientBalance` of ``options``; the rows that it wrote."""
    metric_log = MetricLog(loggers=[JsonlLogger(folder=folder)], every_n_steps=1)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        callbacks=[GradientBalance(metric_log=metric_log, **options), *others],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(made, DataLoader(batches(), batch_size=None))  # type: ignore[arg-type]
    return [row for row in read_metrics(folder / "metrics.jsonl")[0] if "balance/hard" in row]


def test_gradient_norms_match_a_backward_for_each_term() -> None:
    made = module()
    (batch,) = batches(1)
    torch.manual_seed(5)
    losses = made.losses(batch)
    norms = gradient_norms({name: losses[name] for name in made.objective.terms}, list(made.student.parameters()))
    assert all(parameter.grad is None for parameter in made.parameters())
    assert list(norms) == ["hard", "soft", "attention"]
    for name, norm in norms.items():
        made.zero_grad(set_to_none=True)
        torch.manual_seed(5)
        made.losses(batch)[name].backward()
        squares = [p.grad.double().square().sum() for p in made.student.parameters() if p.grad is not None]
        assert norm.item() == pytest.approx(sum(squares).sqrt().item(), rel=1e-4)  # type: ignore[union-attr]
    assert norms["hard"] > 50 * norms["attention"], "or there would be little to balance"


def test_gradient_norms_exclude_penalties_of_quantizers() -> None:
    """As PACT's and BNN+'s; of two in a row, a loss in between meets the first alone."""
    first, second = nn.Parameter(torch.tensor([2.0])), nn.Parameter(torch.tensor([5.0]))
    middle = with_penalty(3 * first, 100 * first.sum())
    end = with_penalty(middle * second, 1000 * second.sum())
    norms = gradient_norms({"middle": middle.sum(), "end": end.sum()}, [first, second])
    assert norms["middle"].item() == pytest.approx(3.0)
    assert norms["end"].item() == pytest.approx((15.0**2 + 6.0**2) ** 0.5)


def test_the_balance_is_the_ratio_to_the_reference_within_its_limit() -> None:
    norms = torch.tensor([2.0, 0.5, 4.0, 0.0, 1e6])
    assert balance_of(norms, 0, 100.0).tolist() == pytest.approx([1.0, 4.0, 0.5, 100.0, 0.01])
    assert balance_of(norms, 2, 1e9).tolist()[:3] == pytest.approx([2.0, 8.0, 1.0])
    assert torch.isfinite(balance_of(torch.zeros(3), 0, 100.0)).all()


def test_balanced_gradient_norms_are_proportional_to_the_weights(tmp_path: Path) -> None:
    """On the batch just measured, and with no memory, exactly; whatever the terms' units."""
    made = module(lr=0.0, dropout=False)
    parts: list[list[float]] = []

    class Spy(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
            losses, objective = made.losses(batch), made.objective
            norms = gradient_norms({name: losses[name] for name in objective.terms}, list(made.student.parameters()))
            parts.append((torch.stack(list(norms.values())) * objective.weights * objective.balance).tolist())

    fit(made, tmp_path, Spy(), every_n_steps=1, decay=0.0)
    for step, (hard, soft, attention) in enumerate(parts):
        soft_weight = 2.0 - step / 6
        assert soft / hard == pytest.approx(soft_weight / 0.5, rel=1e-3)
        assert attention / hard == pytest.approx(1.0 / 0.5, rel=1e-3)


def test_total_loss_uses_the_balance() -> None:
    made = module(dropout=False)
    (batch,) = batches(1)
    made.objective.balance.copy_(torch.tensor([1.0, 3.0, 10.0]))
    losses = made.losses(batch)
    expected = 0.5 * losses["hard"] + 2.0 * 3.0 * losses["soft"] + 10.0 * losses["attention"]
    torch.testing.assert_close(losses["total"], expected)


def test_balance_means_are_logged_as_rows(tmp_path: Path) -> None:
    """Measured after steps 1, 3 and 5; the running mean of norms, not of their ratios."""
    seen: list[dict[str, float]] = []

    class Spy(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
            (callback,) = (c for c in trainer.callbacks if isinstance(c, GradientBalance))
            seen.append(dict(callback.state_dict()["means"]))

    rows = fit(module(), tmp_path, Spy(), every_n_steps=2, decay=0.75, reference="soft")
    assert [row["step"] for row in rows] == [1, 3, 5]
    assert seen[0] == seen[1] != seen[2] == seen[3] != seen[4]
    for row, means in zip(rows, seen[::2], strict=True):
        assert row["balance/soft"] == 1.0
        for name, mean in means.items():
            assert row[f"balance/{name}"] == pytest.approx(means["soft"] / mean, rel=1e-5)


def test_balance_mean_starts_at_the_first_measurement_and_decays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = iter([[1.0, 2.0, 4.0], [3.0, 2.0, 8.0], [float("nan"), 1.0, 1.0], [1.0, 1.0, 1.0]])

    def norms(losses: dict[str, Tensor], parameters: object) -> dict[str, Tensor]:
        return dict(zip(losses, torch.tensor(next(given)), strict=True))

    monkeypatch.setattr("qtrain.training.callbacks.balance.gradient_norms", norms)
    made = module()
    rows = fit(made, tmp_path, every_n_steps=2, decay=0.5)
    assert [rows[0][f"balance/{name}"] for name in made.objective.terms] == [1.0, 0.5, 0.25]
    assert [rows[1][f"balance/{name}"] for name in made.objective.terms] == pytest.approx([1.0, 1.0, 2 / 6])
    assert len(rows) == 2, "a measurement that is not finite counts for nothing"
    assert made.objective.balance.tolist() == pytest.approx([1.0, 1.0, 2 / 6])


def test_balance_measurement_changes_nothing_else(tmp_path: Path) -> None:
    """With a limit of 1 nothing is balanced, and the run is bit for bit the one without the callback."""
    weights = []
    for name, options in {"with": {"every_n_steps": 1}, "hardly": {"every_n_steps": 1000}}.items():
        made = module()
        state: list[Tensor] = []

        class Spy(pl.Callback):
            def on_train_batch_end(self, *arguments: Any) -> None:
                state.append(torch.random.get_rng_state())  # noqa: B023 - used before the next turn

        fit(made, tmp_path / name, Spy(), limit=1.0, **options)
        weights.append((made.state_dict(), state))
    (one, random), (other, other_random) = weights
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert int(one["student.1.num_batches_tracked"]) == 6
    assert all(torch.equal(a, b) for a, b in zip(random, other_random, strict=True))


def test_a_compiled_step_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = counts_graphs(monkeypatch)
    made, eager = module(dropout=False, compile=True), module(dropout=False)
    rows = fit(made, tmp_path / "compiled", every_n_steps=2)
    assert backend.graphs == 1
    assert rows[0]["balance/attention"] != rows[1]["balance/attention"]
    fit(eager, tmp_path / "eager", every_n_steps=2)
    for name, tensor in eager.state_dict().items():
        torch.testing.assert_close(made.state_dict()[name], tensor, msg=name)


def test_balance_is_not_saved_with_regressors() -> None:
    made = module()
    made.objective.balance.fill_(3.0)
    assert not any("balance" in name for name in made.state_dict())


RUN = """
    trainer=cpu data.max_train=256 data.max_test=64 data.batch_size=32 model=cifar_resnet8 model.width=0.25
    teacher=self objective=attention +callback@callbacks.balance=balance callbacks.balance.every_n_steps=2 fit.epochs=2
    full_precision.epochs=1 fit.reestimate_bn=0 quantize.calibration_batches=1 quantize.bits.weight=2
    quantize.bits.input=2 fit.log_every_steps=1 fit.checkpoint_every_steps=3 optimizer.lr=0.01 name=run
    distill.student_layers=[layer1,layer3] distill.teacher_layers=null
""".split()


def test_a_killed_run_ends_as_the_undisturbed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before step 12, in the second epoch; goes on from the point at 9 with the means of the steps before."""

    def run(folder: str) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        overrides = [*RUN, f"output={tmp_path / folder}", f"full_precision.folder={tmp_path / 'cache'}"]
        run_task(compose(overrides), overrides)
        (student,) = (tmp_path / folder).rglob("student.ckpt")
        rows = [json.loads(line) for line in (student.parent / "metrics.jsonl").read_text().splitlines()]
        return latent_state(student.parent), [
            {k: v for k, v in row.items() if k not in ("time", "images_per_s")} for row in rows
        ]

    whole, rows = run("whole")
    step = QATModule.training_step

    def dying(module: QATModule, batch: Batch, batch_idx: int) -> Tensor:
        if module.global_step == 11:
            raise KeyboardInterrupt
        return step(module, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(QATModule, "training_step", dying)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            run("killed")
    resumed, resumed_rows = run("killed")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert rows == resumed_rows
    balances = [row["balance/attention"] for row in rows if "balance/attention" in row]
    assert len(balances) == 8
    assert len(set(balances)) == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_steps": 0}, "GradientBalance: every_n_steps must be at least 1, got 0"),
        ({"decay": 1.0}, r"GradientBalance: decay must be in \[0, 1\), got 1.0"),
        ({"limit": 0.5}, "GradientBalance: limit must be at least 1, got 0.5"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradientBalance(metric_log=MetricLog(loggers=[]), **options)


def test_a_reference_that_is_no_term_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"reference 'hint' is no term of the objective; take one of hard, soft, att"):
        fit(module(), tmp_path, reference="hint")
