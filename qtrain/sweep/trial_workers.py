"""A trial of several processes: Ray Train brings them up, Lightning's DDP joins them by their environment."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
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


def run_with_workers(
    settings: RunSettings,
    proposal: Proposal,
    *,
    threads: int,
    workers: int,
    resources: Mapping[str, float],
    max_failures: int,
    storage: str,
    read: Read,
) -> Trial:
    """As ``run_trial`` in ``workers`` processes on one machine, each with ``resources``; they report by themselves.

    Processes that die are replaced, up to ``max_failures`` times, and go on from the run's resume points.
    """
    folder = Path(settings.run_dir)
    if read_trial(folder) is None:
        TorchTrainer(
            _work,
            train_loop_config={"proposal": vars(proposal), "folder": str(folder), "threads": threads, "read": read},
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=bool(resources.get("GPU")),
                resources_per_worker=dict(resources),
                placement_strategy="STRICT_PACK",
            ),
            run_config=RunConfig(
                name=f"{proposal.key}-{time.time_ns()}",  # a former attempt of that name would be restored
                storage_path=storage,
                callbacks=[TuneReportCallback()],  # type: ignore[list-item]
                failure_config=FailureConfig(max_failures=max_failures),
            ),
        ).fit()
    return run_trial(
        settings, proposal, report=lambda metrics: None, store=RunCache(), threads=threads
    )  # only tells of its end


def _work(config: dict[str, Any]) -> None:
    """One of the processes. Ray Train has set RANK, LOCAL_RANK and the others, and has joined them in a group."""
    proposal = Proposal(**config["proposal"])
    # The variables are torchrun's; with its name for the launch Lightning and the run's lock know what they mean.
    os.environ.setdefault("TORCHELASTIC_RUN_ID", proposal.key)
    settings = config["read"](read_trial_config(Path(config["folder"]), name=proposal.id, knobs=proposal.knobs))
    leads = ray_train.get_context().get_world_rank() == 0

    def report(metrics: dict[str, float]) -> None:
        ray_train.report({**metrics, "metrics": dict(metrics)})

    run_trial(settings, proposal, report=report, store=RunCache(), threads=config["threads"], leads=leads)
