"""A trial that goes on from another one's stages, as the students of a population do."""

import os
import shutil
from pathlib import Path

from qtrain.pipeline.stages import STATE
from qtrain.settings.run_files import METRICS, STAGES
from qtrain.utils.atomic_write import atomic_write


def inherit_stages(parent: Path, folder: Path) -> None:
    """Give the run in ``folder`` what each stage of the run in ``parent`` has left, and its rows of metrics.

    The run's config must begin with the same stages; it then goes on with the next one. States are linked, since many
    runs of a sweep share them, or copied where the file system has no links. What ``folder`` has already stays.
    """
    states = sorted((parent / STAGES).glob(f"*/{STATE}"))
    if not states:
        raise ValueError(f"sweep: {parent} has left no stages to go on from; start it again with overwrite=true")
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / METRICS).exists():
        with atomic_write(folder / METRICS) as temporary:
            shutil.copyfile(parent / METRICS, temporary)
    for state in states:
        own = folder / state.relative_to(parent)
        if own.exists():
            continue
        with atomic_write(own) as temporary:
            try:
                os.link(state, temporary)
            except OSError:
                shutil.copyfile(state, temporary)
