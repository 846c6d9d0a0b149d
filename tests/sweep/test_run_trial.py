"""A trial in this process: what it reports, what it leaves, and how it fails."""

from __future__ import annotations

import json
import math
from pathlib import Path
from unittest.mock import Mock

import pytest

from qtrain.config.compose import compose
from qtrain.pipeline.run_cache import RunCache
from qtrain.settings.run_settings import RunSettings
from qtrain.spec import Position
from qtrain.sweep.run_trial import LOG, EpochReport, Proposal, TrialRecord, _best_before, read_trial, run_trial

TINY = """
    trainer=cpu data.max_train=96 data.max_test=32 data.val_fraction=0.25 data.batch_size=24 model=cifar_resnet8
    model.width=0.25 fit.epochs=3 full_precision.epochs=1 fit.reestimate_bn=0 fit.health_every_steps=0
    fit.final_test=false quantize.calibration_batches=1
""".split()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Full-precision weights, trained once."""
    return tmp_path_factory.mktemp("cache")


def config(folder: Path, cache: Path, *more: str) -> RunSettings:
    return compose([*TINY, f"full_precision.folder={cache}", f"run_dir={folder}", *more])


def test_trial_reports_each_epoch_but_the_last_and_is_not_repeated(tmp_path: Path, cache: Path) -> None:
    settings, told = config(tmp_path / "run", cache), list[dict[str, float]]()
    proposal = Proposal(id="0001", key="run", overrides=["seed=0"], knobs={"seed": 0})
    trial = run_trial(settings, proposal, report=told.append, store=RunCache(), threads=1)
    assert [metrics["epochs"] for metrics in told] == [1.0, 2.0], "the trial itself tells of its last epoch"
    assert told[0]["best_top1"] == told[0]["top1"]
    assert told[1]["best_top1"] == max(told[0]["top1"], told[1]["top1"])
    assert all({"top1", "loss", "size_bytes", "bops"} <= metrics.keys() for metrics in told)
    assert (trial.id, trial.status, trial.epochs, trial.reason) == ("0001", "finished", 3.0, None)
    assert trial.metrics["best_top1"] >= trial.metrics["top1"] and trial.metrics["size_bytes"] == told[0]["size_bytes"]
    assert trial.layer_bits["layer1.0.conv1"] == [4, 4]
    assert trial.ends == ["conv1", "linear"]
    assert trial.images == {"val": 24, "test": 32}
    assert trial.train_s > 0 and not (tmp_path / "run" / "checkpoints").exists()
    assert read_trial(tmp_path / "run") == trial

    other = Proposal(id="0002", key="run", knobs={"seed": 0})
    again = run_trial(settings, other, report=lambda metrics: pytest.fail("trained"), store=RunCache(), threads=1)
    assert (again.id, again.metrics, again.ended) == ("0002", trial.metrics, trial.ended)


def test_the_best_accuracy_is_that_of_all_epochs_so_far(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        "".join(
            json.dumps({"step": step, "split": "val", "top1": top1}) + "\n" for step, top1 in ((1, 80.0), (2, 60.0))
        )
    )
    assert _best_before(tmp_path) == 80 and _best_before(tmp_path / "none") == -math.inf
    record, told = TrialRecord(best_top1=80.0), list[dict[str, float]]()
    reports = EpochReport(
        settings=compose([]), report=told.append, record=record, epochs=9, start=Position(epoch=2, step=2)
    )
    for epoch, top1 in enumerate((70.0, 90.0, 85.0)):
        trainer = Mock(current_epoch=epoch, callback_metrics={"val/top1": top1, "val/loss": 1.0})
        reports.on_train_epoch_end(trainer, Mock())
    assert [metrics["best_top1"] for metrics in told] == [80.0, 90.0, 90.0]


def test_a_reward_may_be_of_any_cost_that_the_config_has(tmp_path: Path, cache: Path) -> None:
    """Energy here, or latency: MnasNet's ratio of accuracy and what a machine takes."""
    own = ("+cost@allocate.costs.energy=energy", "sweep.reward.cost=energy", "sweep.reward.target=0.01", "fit.epochs=2")
    settings, told = config(tmp_path / "run", cache, *own), list[dict[str, float]]()
    trial = run_trial(settings, Proposal(id="1", key="run"), report=told.append, store=RunCache(), threads=1)
    for metrics in (*told, trial.metrics):
        assert metrics["energy"] > 0
        assert metrics["reward"] == pytest.approx(metrics["top1"] * (metrics["energy"] / 0.01) ** -0.07)
    wider = config(tmp_path / "wider", cache, *own, "quantize.bits.weight=8", "quantize.bits.input=8")
    more = run_trial(wider, Proposal(id="2", key="wider"), report=told.append, store=RunCache(), threads=1)
    assert more.metrics["energy"] > trial.metrics["energy"]


def test_trial_with_an_infinite_loss_fails_with_its_reason(tmp_path: Path, cache: Path) -> None:
    settings = config(tmp_path / "run", cache, "optimizer.lr=1.0e+18")
    trial = run_trial(
        settings, Proposal(id="0001", key="run"), report=lambda metrics: None, store=RunCache(), threads=1
    )
    assert trial.status == "failed"
    assert trial.reason is not None and trial.reason.startswith("StopOnNonFinite: the loss is not finite at step")
    assert "size_bytes" in trial.metrics and "top1" not in trial.metrics
    assert "Traceback" in (tmp_path / "run" / LOG).read_text()


def test_trial_without_validation_fails_with_its_reason(tmp_path: Path, cache: Path) -> None:
    settings = config(tmp_path / "run", cache, "data.val_fraction=0")
    trial = run_trial(
        settings, Proposal(id="0001", key="run"), report=lambda metrics: None, store=RunCache(), threads=1
    )
    assert trial.status == "failed" and "without a validation" in str(trial.reason)


def test_what_ends_the_trial_from_outside_passes_through(tmp_path: Path, cache: Path) -> None:
    def stop(metrics: dict[str, float]) -> None:
        raise SystemExit(0)

    with pytest.raises(SystemExit):
        run_trial(
            config(tmp_path / "run", cache), Proposal(id="0001", key="run"), report=stop, store=RunCache(), threads=1
        )
    assert read_trial(tmp_path / "run") is None
