"""Many jobs at once: an array, and a multirun of which SLURM runs each job."""

from __future__ import annotations

import json

import hydra
import pytest
from hydra.errors import MissingConfigException

from qtrain.config.compose import explain
from qtrain.settings.conf_dir import conf_dir
from qtrain.sweep.trial import read_trials
from tests.slurm.scenes import Played
from tests.slurm.trainings import STEPS, metrics


def test_the_launcher_composes_and_builds() -> None:
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = hydra.compose("config", overrides=["hydra/launcher=slurm"], return_hydra_config=True)
        launcher = hydra.utils.instantiate(cfg.hydra.launcher)
    assert launcher.params["tasks_per_node"] == 1 and launcher.params["signal_delay_s"] == 300


def test_what_is_missing_is_named() -> None:
    """As Hydra puts it where the plugin is not installed."""
    error = MissingConfigException("", missing_cfg_file="hydra/launcher/submitit_slurm")
    assert explain(error).endswith("pip install 'qtrain[slurm]'")


@pytest.mark.scene("array")
def test_an_array_has_a_run_for_each_line(played: Played) -> None:
    played.check()
    for name, bits in (("first", 8), ("second", 2)):
        summary = json.loads((played.folder / name / "summary.json").read_text())
        assert (summary["status"], summary["w_bits"]) == ("finished", bits)
        assert metrics(played.folder / name)[-1]["step"] == STEPS
    assert "task 2: name=second quantize.bits.weight=2" in played.log


@pytest.mark.scene("array")
def test_of_two_tasks_one_trains_the_weights_that_both_need(played: Played) -> None:
    played.check()
    assert played.log.count("full-precision cifar_resnet20: no weights; training 1 epochs") == 1
    assert played.log.count("full-precision cifar_resnet8: no weights; training 1 epochs") == 1


@pytest.mark.scene("multirun")
def test_a_multirun_has_a_job_for_each_value(played: Played) -> None:
    played.check()
    for name, bits in (("w4a4-distill", 4), ("w8a4-distill", 8)):
        summary = json.loads((played.folder / name / "summary.json").read_text())
        assert (summary["status"], summary["w_bits"]) == ("finished", bits)
    assert "Submitit 'slurm' sweep output dir" in played.log


@pytest.mark.scene("sweep")
def test_a_sweep_has_all_nodes_of_its_allocation(played: Played) -> None:
    played.check()
    assert "Ray on 2 nodes, head 10.89." in played.log
    trials = read_trials(played.folder)
    assert [trial.status for trial in trials] == ["finished"] * 4
    assert {trial.host for trial in trials} <= {"node1", "node2"}
    assert (played.folder / "sweep.html").exists()
