"""What a sweep stands on, looked at before the first trial: room on the disk, machines large enough."""

import shutil
import uuid
from pathlib import Path
from typing import Any

import ray

from qtrain.settings.run_settings import RunSettings
from qtrain.utils.checks import check_writable
from qtrain.utils.errors import ConfigError

LEAST_BYTES = 64 * 1024**2
"""Free space without which no sweep begins."""

OBJECT_STORE_BYTES = 128 * 1024**2
"""Of a local Ray, which here moves metrics and no tensors."""

TRIAL = "qtrain_trial"
"""Ray's name for a place in which one trial may run, where this command limits how many there are."""


def check_folder(folder: Path, key: str) -> None:
    """Raise ``ConfigError`` for the config's ``key`` where nothing can be kept in ``folder``."""
    check_writable(folder, key)
    free = shutil.disk_usage(folder).free
    if free < LEAST_BYTES:
        raise ConfigError(
            f"{key}: {folder} has {free / 1e6:.0f} MB left, and a sweep needs at least {LEAST_BYTES / 1e6:.0f}; free "
            "some, or give another path"
        )


def start_ray(settings: RunSettings) -> bool:
    """Attach to the cluster ``sweep.address``, or start Ray here; returns whether this command has to end it.

    Raises ``ConfigError`` where there is no such cluster.
    """
    if ray.is_initialized():
        return False
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
    if settings.sweep.address is not None:
        try:
            ray.init(address=settings.sweep.address, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"sweep.address: no Ray cluster answers at {settings.sweep.address} ({reason})"
            ) from error
        return True
    places: dict[str, float] = {} if settings.sweep.parallel is None else {TRIAL: settings.sweep.parallel}
    ray.init(
        address="local", include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, resources=places, **quiet
    )
    return True


def check_machines(settings: RunSettings) -> tuple[dict[str, float], dict[str, float]]:
    """What Ray is to keep for each worker of a trial, and for the trial besides.

    Raises ``ConfigError`` where no machine has as much.
    """
    wanted = {"CPU": float(settings.sweep.resources.cpu), "GPU": float(settings.sweep.resources.gpu)}
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for kind, amount in wanted.items():
        most = max((machine.get(kind, 0.0) for machine in machines), default=0.0)
        asked = amount * settings.sweep.workers
        if asked > most:
            raise ConfigError(
                f"sweep.resources.{kind.lower()}: a trial asks for {asked:g} and no machine has more than "
                f"{most:g}; ask for less, or attach to a larger cluster (sweep.address)"
            )
    limited = any(TRIAL in machine for machine in machines)
    return {kind: amount for kind, amount in wanted.items() if amount}, {TRIAL: 1.0} if limited else {}


def room(settings: RunSettings) -> int:
    """How many trials of several workers fit on the cluster, each on one machine."""
    wanted = {
        "CPU": settings.sweep.resources.cpu * settings.sweep.workers,
        "GPU": settings.sweep.resources.gpu * settings.sweep.workers,
    }
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(
        int(min(machine.get(kind, 0.0) // amount for kind, amount in wanted.items() if amount)) for machine in machines
    )


def check_seen_from_all(folder: Path) -> None:
    """Raise ``ConfigError`` unless each machine of the cluster sees ``folder``, where trials leave what they make."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2:
        return
    token = folder / f".seen-{uuid.uuid4().hex}"
    token.touch()
    look: Any = ray.remote(num_cpus=0)(lambda path: Path(path).exists())
    try:
        for node in nodes:
            strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            if not ray.get(look.options(scheduling_strategy=strategy).remote(str(token))):
                raise ConfigError(
                    f"run_dir: {node['NodeManagerHostname']} does not see {folder}; give a path that all machines of "
                    "the cluster share"
                )
    finally:
        token.unlink(missing_ok=True)
