"""What W&B is told of a run: by the task itself, read back from what the real client has put on the disk."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from qtrain.config.compose import compose
from qtrain.pipeline.summary import read_summary
from qtrain.spec import Batch
from qtrain.sweep.sweep_results import read_sweep
from qtrain.sweep.trial import Trial, append_trial
from qtrain.sweep.wandb_sweep import sweep_group, tell_sweep
from qtrain.tasks import train
from qtrain.training.module import QATModule
from qtrain.utils.errors import RunInterruptedError
from qtrain.utils.json_lines import read_metrics
from tests.helpers.wandb_records import Recorded, read_run

TINY = """
    trainer=cpu data.max_train=320 data.max_test=100 data.val_fraction=0.2 model=cifar_resnet8 model.width=0.5
    teacher=cifar_resnet20 teacher.model.width=0.5 objective=soft fit.epochs=2 full_precision.epochs=1
    fit.reestimate_bn=1 quantize.calibration_batches=1 fit.log_every_steps=1 fit.health_every_steps=0
    fit.checkpoint_every_steps=1 logger=wandb logger.wandb.group=bits logger.wandb.job_type=trial
    logger.wandb.knobs={temperature:4}
""".split()

LOSSES = ("train/total", "val/loss")


def run(folder: Path, cache: Path, *more: str) -> dict[str, Any]:
    return train.run(compose([*TINY, f"run_dir={folder}", f"full_precision.folder={cache}", *more]))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where full-precision weights are kept, trained by the first run that needs them."""
    return tmp_path_factory.mktemp("weights")


def recorded(folder: Path) -> Recorded:
    (part,) = (folder / "wandb").glob("offline-run-*")
    return read_run(part)


def rows_on_disk(folder: Path) -> list[tuple[int, str, float]]:
    """(step, metric, value) of the losses in metrics.jsonl."""
    rows = read_metrics(folder / "metrics.jsonl")[0]
    named = [(row["step"], f"{row['split']}/{name}", value) for row in rows for name, value in row.items()]
    return [row for row in named if row[1] in LOSSES]


def rows_in_wandb(found: Recorded) -> list[tuple[int, str, float]]:
    return [(row["step"], name, value) for row in found.history for name, value in row.items() if name in LOSSES]


def test_trial_logs_config_bits_files_and_summary(wandb_client: None, tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "trial"
    run(folder, cache)
    found, summary = recorded(folder), read_summary(folder / "summary.json")
    assert (found.group, found.job_type, found.exit_code) == ("bits", "trial", 0)
    assert found.config["knobs"] == {"temperature": 4}
    assert found.config["quantize"]["bits"]["weight"] == 4
    for name in (
        "top1",
        "fp_top1",
        "ptq_top1",
        "size_bytes",
        "compression",
        "effective_bits",
        "bops",
        "macs",
        "status",
    ):
        assert found.summary[name] == getattr(summary, name), name
    assert rows_in_wandb(found) == rows_on_disk(folder) != []
    assert [row["bits/weight"] for row in found.rows("bits/weight")] == [r["weight_bits"] for r in summary.layers]

    weights = sorted(path.parent.name for path in cache.glob("*/model.safetensors"))
    used = sorted(name for name, artifact in found.artifacts.items() if artifact.use_after_commit)
    assert used == weights and len(used) == 2, "what the student starts from, and the teacher"
    student = found.artifacts["student-trial"]
    (entry,) = student.manifest.contents
    assert Path(entry.local_path) == folder / "student.safetensors"
    assert entry.size == (folder / "student.safetensors").stat().st_size
    assert json.loads(student.metadata)["size_bytes"] == summary.size_bytes


def test_run_ended_by_sigterm_is_finished_and_resumed(
    wandb_client: None, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training_step = QATModule.training_step

    def interrupted(module: QATModule, batch: Batch, batch_idx: int) -> Tensor:
        if module.global_step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return training_step(module, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(QATModule, "training_step", interrupted)
        with pytest.raises(RunInterruptedError):
            run(tmp_path, cache)
    stopped = recorded(tmp_path)
    assert stopped.preempting and stopped.summary["status"] == "interrupted"
    assert stopped.summary["size_bytes"] > 0, "costs are told before training"
    run(tmp_path, cache)
    whole = recorded(tmp_path)
    assert whole.id == stopped.id and not whole.preempting
    assert rows_in_wandb(whole) == rows_on_disk(tmp_path)
    assert [step for step, name, _ in rows_in_wandb(whole) if name == "train/total"] == list(range(1, 9))


def test_sweep_is_logged_in_the_group_of_its_trials(wandb_client: None, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    cfg = compose(["task=sweep", "logger=wandb", "+experiment=sweep_quickstart", f"run_dir={folder}"])
    append_trial(folder, Trial(id="a", key="ka", status="finished", metrics={"top1": 90.0, "size_bytes": 10.0}))
    student = folder / "trials" / "ka" / "student.safetensors"
    student.parent.mkdir(parents=True)
    student.write_bytes(b"weights")
    tell_sweep(cfg, read_sweep(folder))
    found = recorded(folder)
    assert (found.group, found.job_type) == (sweep_group(cfg.plain, folder), "sweep")
    assert found.group == (cfg.name or cfg.experiment)
    assert found.config["sweep"]["objectives"] == dict(cfg.sweep.objectives)
    assert found.artifacts[f"student-{cfg.experiment}-ka".replace("/", "-")].use_after_commit
