"""A trial of several processes: Ray Train brings them up, Lightning's DDP joins them by their environment."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import train as ray_train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback

from qtrain.pipeline.run_cache import RunCache
from qtrain.settings.run_settings import Read, RunSettings
from qtrain.sweep.run_trial import Proposal, read_trial, run_trial
from qtrain.sweep.trial import Trial
from qtrain.sweep.trial_configs import read_trial_config


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """What all trials of a sweep have in common, and a worker has to know.

    A trial's run is in ``folder/<key>``; ``storage`` is where Ray keeps its own files. ``resources`` are those of each
    of ``workers`` processes, ``threads`` those of torch in one. ``cwd`` is the driver's, which paths in configs are
    relative to; ``read`` makes settings of a config. A process of many trials keeps at most ``cache_bytes`` of data and
    models between them.
    """

    folder: str
    storage: str
    resources: dict[str, float]
    threads: int
    workers: int
    max_failures: int
    cache_bytes: float
    cwd: str
    read: Read


def run_with_workers(settings: RunSettings, proposal: Proposal, setting: WorkerSettings) -> Trial:
    """As ``run_trial`` in several processes on one machine, which report by themselves.

    Processes that die are replaced, up to ``max_failures`` times, and go on from the run's resume points.
    """
    folder = Path(settings.run_dir)
    if read_trial(folder) is None:
        TorchTrainer(
            _work,
            # Plain values: a process reads them before it knows its rank, which Lightning asks for when it is imported.
            train_loop_config={"proposal": vars(proposal), "folder": str(folder), "setting": vars(setting)},
            scaling_config=ScalingConfig(
                num_workers=setting.workers,
                use_gpu=bool(setting.resources.get("GPU")),
                resources_per_worker=setting.resources,
                placement_strategy="STRICT_PACK",
            ),
            run_config=RunConfig(
                name=f"{proposal.key}-{time.time_ns()}",  # a former attempt of that name would be restored
                storage_path=setting.storage,
                callbacks=[TuneReportCallback()],  # type: ignore[list-item]
                failure_config=FailureConfig(max_failures=setting.max_failures),
            ),
        ).fit()
    # Only tells of its end.
    return run_trial(settings, proposal, report=lambda metrics: None, store=RunCache(), threads=setting.threads)


def _work(config: dict[str, Any]) -> None:
    """One of the processes. Ray Train has set RANK, LOCAL_RANK and the others, and has joined them in a group."""
    proposal, setting = Proposal(**config["proposal"]), WorkerSettings(**config["setting"])
    # The variables are torchrun's; with its name for the launch Lightning and the run's lock know what they mean.
    os.environ.setdefault("TORCHELASTIC_RUN_ID", proposal.key)
    settings = setting.read(read_trial_config(Path(config["folder"]), name=proposal.id, knobs=proposal.knobs))
    leads = ray_train.get_context().get_world_rank() == 0

    def report(metrics: dict[str, float]) -> None:
        ray_train.report({**metrics, "metrics": dict(metrics)})

    run_trial(settings, proposal, report=report, store=RunCache(), threads=setting.threads, leads=leads)
