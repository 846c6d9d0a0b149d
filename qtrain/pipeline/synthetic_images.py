"""Images from a model instead of data: made once for each model and method, by several processes, and kept.

The folder is named by a hash of all that the images depend on, so that the next run, and the next experiment with the
same model, finds them. Each batch is a file of its own; a stopped synthesis goes on with those that are missing, and
workers, here or on other nodes that see the folder, divide them by number.
"""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.multiprocessing
from filelock import FileLock
from torch import nn

from qtrain.data.synthetic_store import (
    IMAGES_MANIFEST,
    Manifest,
    Shard,
    read_manifest,
    read_shard,
    shard_path,
    write_manifest,
    write_shard,
)
from qtrain.models.identity import structure_digest, weights_digest
from qtrain.models.memory_format import to_channels_last_
from qtrain.pipeline.build_model import build_model, example_input, has_weights
from qtrain.settings.run_identity import hash_of
from qtrain.settings.run_settings import RunSettings
from qtrain.spec import DataInfo
from qtrain.synthesis.base import Synthesis
from qtrain.training.ranks import first_rank_first
from qtrain.utils.errors import ConfigError, as_config_error

log = logging.getLogger(__name__)

JOIN_POLL_S = 2.0


@dataclass(frozen=True)
class SyntheticFolder:
    """A folder of images; ``made`` of them in this process and its workers, in ``seconds``."""

    folder: Path
    manifest: Manifest
    made: int
    seconds: float


@dataclass(frozen=True)
class Synthesizer:
    """All that a worker needs: the models, the method, where the images go, and where what the method learned lies.

    The latter is of all numbers of images: to ask for more of them is not to learn anew.
    """

    settings: RunSettings
    models: dict[str, nn.Module]
    method: Synthesis
    info: DataInfo
    folder: Path
    learned: Path

    @property
    def batches(self) -> int:
        return -(-int(self.settings.synthesize.images) // self.method.batch_size)

    @property
    def paths(self) -> list[Path]:
        return [shard_path(self.folder, number, self.batches) for number in range(self.batches)]


def synthesize_images(settings: RunSettings) -> SyntheticFolder:
    """The folder of images that ``settings.synthesis`` makes of ``settings.model``; what is missing there is made
    first.

    Where another process has a share of the batches (``synthesize.world_size``), waits for no one: raises
    ``ConfigError`` that says so when this one's share is done and others are not.
    """
    made_by = _synthesizer(settings)
    folder = made_by.folder
    if settings.synthesize.world_size == 1:  # ranks of a training share the images, and the first one makes them
        first_rank_first((folder / IMAGES_MANIFEST).is_file, what=f"synthesizes images in {folder}")
    if (folder / IMAGES_MANIFEST).is_file():
        log.info("synthetic images: found %s", folder)
        return SyntheticFolder(folder, read_manifest(folder), 0, 0.0)
    log.info("synthesizing %d images in %s", made_by.batches * made_by.method.batch_size, folder)
    start, kept = time.perf_counter(), sum(shard.images for shard in _shards(made_by))
    _make_all(made_by)
    shards = _shards(made_by)
    if len(shards) < made_by.batches:
        raise ConfigError(
            f"synthesize: {made_by.batches - len(shards)} of {made_by.batches} batches are still to be made by other "
            f"ranks of synthesize.world_size={settings.synthesize.world_size}; the last one to end finishes the folder"
        )
    manifest = write_manifest(folder, _made_from(made_by), shards)
    made = sum(shard.images for shard in shards) - kept
    return SyntheticFolder(folder, manifest, made, time.perf_counter() - start)


def _synthesizer(settings: RunSettings) -> Synthesizer:
    if not settings.synthesis:
        raise ConfigError("synthesis: no method; take synthesis=bn_statistics, or give data.folder with images")
    info = settings.data.build(seed=settings.seed).facts
    method: Synthesis = settings.synthesis.build()
    # Further models go by their names in the config: two may be of one kind, with other weights.
    chosen = {settings.model.name: settings.model}
    for name, further in settings.synthesize.models.items():
        if name in chosen:
            raise ConfigError(f"synthesize.models.{name}: is what the model itself is called; take another name")
        if further is not None:
            chosen[name] = further
    models = {}
    for name, model in chosen.items():
        if not has_weights(model):
            raise ConfigError(f"{model.key}.weights: images are synthesized by a trained model; give its weights")
        models[name] = _frozen(build_model(model, info))
        if settings.fit.channels_last:
            to_channels_last_(models[name], example_input(info, size=2))
    with as_config_error("synthesis"):
        method.check(list(models.values()))
    unplaced = Synthesizer(settings, models, method, info, Path(), Path())
    made_from = _made_from(unplaced)
    folder, key = Path(settings.synthesize.folder).expanduser(), hash_of(made_from)
    learned = folder / f"{settings.data.name}-learned-{hash_of(made_from, ignore=('batches',))}"
    return replace(unplaced, folder=folder / f"{settings.data.name}-{key}", learned=learned)


def _frozen(model: nn.Module) -> nn.Module:
    return model.eval().requires_grad_(False)


def _made_from(made_by: Synthesizer) -> dict[str, object]:
    """All that the images are a function of, as plain values."""
    facts = {name: value for name, value in vars(made_by.info).items() if name != "classes"}
    return {
        "models": {
            name: {"weights": weights_digest(model), "structure": structure_digest(model)}
            for name, model in made_by.models.items()
        },
        "method": made_by.settings.plain["synthesis"],
        "batches": made_by.batches,
        "seed": made_by.settings.seed,
        "data": {**facts, "mean": list(made_by.info.mean), "std": list(made_by.info.std)},
    }


def _shards(made_by: Synthesizer) -> list[Shard]:
    """The batches that are there whole; damaged ones are removed."""
    return [shard for path in made_by.paths if (shard := read_shard(path)) is not None]


def _make_all(made_by: Synthesizer) -> None:
    """Make this process's share of the batches, alone or with workers."""
    section = made_by.settings.synthesize
    if not 0 <= section.rank < section.world_size:
        raise ConfigError(
            f"synthesize.rank: must be in 0..{section.world_size - 1}, below synthesize.world_size, got {section.rank}"
        )
    share = range(section.rank, made_by.batches, section.world_size)
    missing = [number for number in share if not made_by.paths[number].is_file()]
    workers = min(section.workers or _default_workers(), len(missing))
    _learn(made_by, torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))
    if workers <= 1:
        for number in missing:
            _make(made_by, number, worker=0)
            _say(made_by)
        return
    context = torch.multiprocessing.spawn(_work, (made_by.settings, missing, workers), nprocs=workers, join=False)
    assert context is not None
    kept = -1
    while not context.join(timeout=JOIN_POLL_S):
        if (now := sum(path.is_file() for path in made_by.paths)) != kept:
            kept = now
            _say(made_by)


def _work(worker: int, settings: RunSettings, missing: list[int], workers: int) -> None:
    """A worker process: its share of the missing batches."""
    made_by = _synthesizer(settings)
    _learn(made_by, _device(worker))
    for number in missing[worker::workers]:
        _make(made_by, number, worker)


def _learn(made_by: Synthesizer, device: torch.device) -> None:
    made_by.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(made_by.learned.with_name(f".{made_by.learned.name}.lock")), _threads(device):
        models = [model.to(device) for model in made_by.models.values()]
        made_by.method.learn(models, made_by.info, seed=made_by.settings.seed, folder=made_by.learned, device=device)


def _make(made_by: Synthesizer, number: int, worker: int) -> None:
    device = _device(worker)
    with _threads(device):
        models = [model.to(device) for model in made_by.models.values()]
        made = made_by.method.make(models, made_by.info, number=number, seed=made_by.settings.seed, device=device)
    write_shard(made_by.paths[number], made.images.numpy(), made.labels.numpy(), made.metrics)


def _say(made_by: Synthesizer) -> None:
    log.info("synthesized %d of %d batches", sum(path.is_file() for path in made_by.paths), made_by.batches)


def _device(worker: int) -> torch.device:
    count = torch.cuda.device_count()
    return torch.device("cuda", worker % count) if count else torch.device("cpu")


def _default_workers() -> int:
    return torch.cuda.device_count() or len(os.sched_getaffinity(0))


@contextmanager
def _threads(device: torch.device) -> Iterator[None]:
    """One thread on a CPU: how a sum is split over threads changes its last bits, and images must not depend on it."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
