"""What a run leaves in its folder: config, summary, results row. Written by tasks, never by hand."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from pytorch_lightning.utilities import rank_zero_only

from qtrain.costs.count import CostReport
from qtrain.pipeline.former_run import bring_back, has_begun, replacing, set_aside
from qtrain.pipeline.results import append_row, check_results, provenance, read_results
from qtrain.pipeline.run_lock import only_run_in
from qtrain.pipeline.summary import FINISHED, RunSummary, read_summary, write_summary
from qtrain.settings.run_files import CONFIG, RESULTS, SUMMARY, read_config, write_config
from qtrain.settings.run_identity import comparable, hash_of, recorded
from qtrain.settings.run_settings import RunSettings
from qtrain.spec import FULL_PRECISION, Allocation, DataInfo
from qtrain.utils.errors import ConfigError, one_line

log = logging.getLogger(__name__)

WHICH_IMAGES = ("name", "root", "hub", "folder", "builder", "options", "test")
"""Options of data modules that say where images come from."""

Metrics = dict[str, float | None]
"""A task's results by name; ``None`` for what was not measured."""


def run_in_folder(settings: RunSettings, work: Callable[[Path], Metrics], *, names: Sequence[str]) -> Metrics:
    """What ``work`` returns for the run's folder, which no other process may use meanwhile.

    A finished run of the same config is not repeated: the metrics ``names`` of its summary are returned, and
    ``settings.results`` gets the rows that the run ended with, unless it has them. Raises ``ConfigError`` where the
    folder holds a run of another config.
    """
    folder = Path(settings.run_dir)
    if settings.results:
        check_results(settings.results)
    if (finished := finished_run(settings, folder)) is None:
        with only_run_in(folder):
            bring_back(folder)  # where a process was killed before its run began
            if (finished := claim_folder(settings, folder)) is None:  # else by another process, just now
                with replacing(folder):
                    return work(folder)
    log.info("%s is finished; overwrite=true runs it again", folder)
    _copy_last_rows(settings, folder)
    return finished.metrics(names)


def claim_folder(settings: RunSettings, folder: Path) -> RunSummary | None:
    """Make ``folder`` this run's, or return what :func:`finished_run` does, and raise what it raises."""
    if (finished := finished_run(settings, folder)) is None:
        _make_ready(settings, folder)
    return finished


def finished_run(settings: RunSettings, folder: Path) -> RunSummary | None:
    """The summary of the run of this very config that has finished in ``folder``, where nothing is written.

    Raises ``ConfigError`` where it holds a run of another config and ``settings.overwrite`` is false.
    """
    if (folder / CONFIG).is_file() and not settings.overwrite:
        before = read_config(folder / CONFIG)
        same = hash_of(comparable(recorded(before))) == settings.identity
        # A run that failed before its first resume point has nothing to lose, and must not block its folder.
        if not same and has_begun(folder):
            raise ConfigError(
                f"run_dir: {folder} holds a run of another config; choose another name=..., or overwrite=true to "
                "replace it"
            )
        if same and (folder / SUMMARY).is_file():
            summary = read_summary(folder / SUMMARY)
            if summary.status == FINISHED:
                return summary
    return None


@rank_zero_only
def _make_ready(settings: RunSettings, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if settings.overwrite or not settings.resume:
        set_aside(folder)
    write_config(folder / CONFIG, recorded(settings.plain))


def describe(settings: RunSettings, info: DataInfo, allocation: Allocation, cost: CostReport) -> dict[str, object]:
    """The fields of a summary that do not depend on how training went."""
    weight, input = typical_bits(allocation)
    return {
        "experiment": settings.experiment,
        "dataset": info.name,
        "model": settings.model.name,
        "quantizer": _quantizer_name(settings) if allocation else None,
        "w_bits": weight,
        "a_bits": input,
        "seed": settings.seed,
        "test_images": info.test_size,
        "data_hash": _data_hash(settings, info),
        "recipe_hash": settings.recipe,
        **cost.as_dict(),
    }


def append_results(
    settings: RunSettings, folder: Path, summary: Mapping[str, object], *, device: torch.device, notes: str
) -> None:
    """One row to the run's own ``results.csv``, and to ``settings.results`` where that names a file.

    A student of many bits has a row for each width. If only the latter fails, a warning says so: the row stands in the
    run's folder.
    """
    row = {
        **provenance(device),
        "config_hash": settings.identity,
        "task": settings.task,
        "notes": notes,
        **{key: value for key, value in summary.items() if key not in ("layers", "status", "header_bytes", "widths")},
    }
    widths = summary.get("widths") or {}
    assert isinstance(widths, Mapping)
    rows = [{**row, **figures, "widths": " ".join(widths)} for figures in widths.values()] or [row]
    for one in rows:
        append_row(folder / RESULTS, one)
    _copy_rows(settings, folder, rows)


@rank_zero_only
def _copy_last_rows(settings: RunSettings, folder: Path) -> None:
    """Give ``settings.results`` the rows that the finished run in ``folder`` ended with, unless it has them."""
    if not settings.results or not (folder / RESULTS).is_file():
        return

    def of_run(path: Path | str) -> list[dict[str, str]]:
        rows = read_results(path) if Path(path).is_file() else []
        return [row for row in rows if (row["config_hash"], row["task"]) == (settings.identity, settings.task)]

    own = of_run(folder / RESULTS)
    last = [row for row in own if row["date"] == own[-1]["date"]]
    if last and not any(row["date"] == last[0]["date"] for row in of_run(settings.results)):
        _copy_rows(settings, folder, last)


def _copy_rows(settings: RunSettings, folder: Path, rows: Sequence[Mapping[str, object]]) -> None:
    own = folder / RESULTS
    if settings.results and Path(settings.results) != own:
        try:
            for row in rows:
                append_row(settings.results, row)
        except (OSError, ValueError) as error:
            log.warning("results: %s; the row of this run is in %s", one_line(error), own)


def finish(folder: Path, summary: Mapping[str, object]) -> None:
    """Write ``summary.json``, after which the run counts as finished."""
    write_summary(folder, summary)


def typical_bits(allocation: Allocation) -> tuple[int, int]:
    """The weight and input bits that most layers have; full precision for an empty allocation.

    Operands of operations, which have no weight, do not count beside layers with a quantized one, and the first and the
    last of these do not beside others.
    """
    weighted = [bits for bits in allocation.values() if bits.weight < FULL_PRECISION] or list(allocation.values())
    pairs = weighted[1:-1] or weighted
    typical = max(pairs, key=pairs.count) if pairs else (FULL_PRECISION, FULL_PRECISION)
    return typical[0], typical[1]


def _data_hash(settings: RunSettings, info: DataInfo) -> str:
    """A hash that the runs of an output folder share if they have the same images, as far as options and sizes tell."""
    options = {key: value for key, value in settings.plain["data"].items() if key in WHICH_IMAGES}
    sizes = [info.num_classes, info.in_channels, info.image_size, info.train_size, info.val_size, info.test_size]
    return hash_of({**options, "sizes": sizes})


def _quantizer_name(settings: RunSettings) -> str:
    names = [chosen.kind.lower() for chosen in (settings.quantize.weight, settings.quantize.input)]
    return "/".join(dict.fromkeys(names))
