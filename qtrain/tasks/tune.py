"""The task that finds temperature and weight of distillation for a bit width, in a short search.

What helps a student in full precision can wreck one of two bits, so each width is searched for itself. A candidate is a
training run as ``task=train`` makes it, shorter; candidates are compared on images held out of the training images,
never on test images. One candidate has no teacher, and stays to the end.
"""

from __future__ import annotations

import io
import logging
import shutil
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from pytorch_lightning.utilities import rank_zero_only

from qtrain.config.compose import compose
from qtrain.models.weights import load_weights
from qtrain.pipeline import prepare, run_folder
from qtrain.pipeline.build_model import build_model, example_input
from qtrain.pipeline.load_data import load_data
from qtrain.pipeline.results import append_row, provenance, read_rows
from qtrain.report.table import plain_table
from qtrain.tasks import train
from qtrain.tasks.halving import Score, rung_epochs, search
from qtrain.training.evaluation import evaluate
from qtrain.utils.atomic_write import write_text
from qtrain.utils.errors import ConfigError

log = logging.getLogger(__name__)

TABLE, TUNED = "tune.csv", "tuned.yaml"
ALONE = "alone"
"""The candidate without distillation."""


@dataclass(frozen=True)
class Candidate:
    """A temperature and the teacher's share of the objective; ``None`` both for no teacher at all."""

    temperature: float | None = None
    weight: float | None = None

    @property
    def name(self) -> str:
        return ALONE if self.weight is None else f"t{self.temperature:g}-w{self.weight:g}"

    @property
    def overrides(self) -> list[str]:
        """The candidate as a user would write it."""
        if self.weight is None:
            return ["teacher=none", "objective=hard"]
        values = {"temperature": self.temperature, "soft": self.weight, "hard": _rest(self.weight)}
        return [f"distill.{key}={value:g}" for key, value in values.items()]


@dataclass(frozen=True)
class Found:
    """The search for one bit width: its label, what sets its bits, and the scores of each rung by candidate."""

    label: str
    bits: list[str]
    epochs: list[int]
    rungs: list[dict[str, Score]]
    candidates: dict[str, Candidate]

    @property
    def winner(self) -> Candidate:
        last = self.rungs[-1]
        return self.candidates[min(last, key=lambda name: last[name].order)]

    @property
    def overrides(self) -> list[str]:
        return [*self.bits, *self.winner.overrides]


def run(cfg: DictConfig) -> dict[str, Any]:
    """Search each of ``tune.widths``; returns the winners as ``<width>/temperature``, ``<width>/weight`` and so on.

    Candidates that have been measured stand in ``tune.csv`` and are not repeated; one that was stopped goes on.
    """
    _check(cfg)
    folder = Path(cfg.run_dir)
    if cfg.overwrite or not cfg.resume:
        (folder / TABLE).unlink(missing_ok=True)
        shutil.rmtree(folder / "candidates", ignore_errors=True)
    known = _known(folder / TABLE)
    found = [_search(cfg, width, folder, known) for width in (cfg.tune.widths or [None])]
    _show(found, folder)
    metrics: dict[str, Any] = {}
    for search_ in found:
        winner, scores = search_.winner, search_.rungs[-1]
        metrics[f"{search_.label}/temperature"], metrics[f"{search_.label}/weight"] = winner.temperature, winner.weight
        metrics[f"{search_.label}/val_top1"] = scores[winner.name].top1
        metrics[f"{search_.label}/val_top1_alone"] = scores[ALONE].top1
    return metrics


def _check(cfg: DictConfig) -> None:
    tune = cfg.tune
    rules = {
        "temperatures": (tune.temperatures and min(tune.temperatures) > 0, "a list of numbers above 0"),
        "weights": (tune.weights and all(0 < weight <= 1 for weight in tune.weights), "a list of numbers in (0, 1]"),
        "epochs": (tune.epochs >= 1, "at least 1"),
        "rungs": (tune.rungs >= 1, "at least 1"),
        "keep": (0 < tune.keep < 1, "in (0, 1)"),
        "val_fraction": (0 < tune.val_fraction < 1, "in (0, 1)"),
    }
    for key, (kept, rule) in rules.items():
        if not kept:
            raise ConfigError(f"tune.{key}: must be {rule}, got {tune[key]}")
    if cfg.stages:
        raise ConfigError("tune: searches for a single fit, and this experiment has stages; add stages=none")
    if cfg.teacher.model is None:
        raise ConfigError("tune: there is no teacher to learn from; name one, for instance teacher=cifar_resnet56")
    if not {"weight", "input"} <= set(cfg.quantize.bits) and tune.widths:
        raise ConfigError(
            "tune.widths: needs an allocation with one width for all layers; take allocate@quantize.bits=uniform"
        )
    pair = [_of(cfg, Candidate(temperature, weight)) for temperature, weight in ((1.0, 0.25), (2.0, 0.5))]
    if run_folder.plain_config(pair[0])["objective"] == run_folder.plain_config(pair[1])["objective"]:
        raise ConfigError(
            "tune: the objective reads neither distill.temperature nor distill.soft, so that there is nothing to find; "
            "take objective=soft"
        )


def _search(cfg: DictConfig, width: int | None, folder: Path, known: dict[str, Score]) -> Found:
    cfg = cfg.copy()
    bits = [] if width is None else [f"quantize.bits.weight={width}", f"quantize.bits.input={width}"]
    if width is not None:
        cfg.quantize.bits.weight = cfg.quantize.bits.input = width
    weight, input = cfg.quantize.bits.get("weight"), cfg.quantize.bits.get("input")
    label = "tuned" if weight is None or input is None else f"w{weight}a{input}"
    grid = [Candidate(), *(Candidate(t, w) for t in cfg.tune.temperatures for w in cfg.tune.weights)]
    candidates = {candidate.name: candidate for candidate in grid}
    epochs = rung_epochs(cfg.tune.epochs, cfg.tune.rungs, cfg.tune.keep)

    def measure(name: str, given: int) -> Score:
        own = _of(cfg, candidates[name], epochs=given)
        key = run_folder.identity_of(own)
        if key not in known:
            own.run_dir = str(folder / "candidates" / f"{label}-{name}-{given}ep-{key}")
            log.info("%s: %s for %d epoch(s)", label, name, given)
            known[key] = _measure(own, candidates[name], folder / TABLE)
        return known[key]

    rungs = search(list(candidates), measure, epochs=epochs, keep=cfg.tune.keep, spared=ALONE)
    return Found(label, bits, epochs, rungs, candidates)


def _of(cfg: DictConfig, candidate: Candidate, epochs: int | None = None) -> DictConfig:
    """The training run of ``candidate``: ``cfg`` with its part of the objective, its length, and images held out."""
    own = cfg.copy()
    own.task, own.results, own.variants, own.select, own.logger = "train", None, None, None, {}
    own.fit.final_test = False
    if not own.data.get("val_fraction"):
        own.data.val_fraction = cfg.tune.val_fraction
    if epochs is not None:
        own.fit.epochs = epochs
    if candidate.weight is None:
        alone = compose(candidate.overrides)
        own.teacher, own.objective = alone.teacher, alone.objective
    else:
        own.distill.temperature = candidate.temperature
        own.distill.soft, own.distill.hard = candidate.weight, _rest(candidate.weight)
    return own


def _measure(cfg: DictConfig, candidate: Candidate, table: Path) -> Score:
    """Train the candidate and evaluate its student on the validation images; its row is kept, its folder is not."""
    start = time.perf_counter()
    folder = Path(cfg.run_dir)
    with redirect_stdout(io.StringIO()):  # its own closing table, which would compare it on test images
        train.run(cfg)
    data = load_data(cfg)
    student = build_model(cfg.model, data.info)
    allocation = prepare.convert(cfg, student, example_input(data.info)).allocation if cfg.quantize.enabled else {}
    load_weights(student, str(folder / run_folder.STUDENT))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    held_out = data.val_dataloader()
    assert not isinstance(held_out, list), "_of holds images out"
    metrics = evaluate(student, held_out, device)
    score = Score(metrics["top1"], metrics["loss"])
    w_bits, a_bits = run_folder.typical_bits(allocation)
    row = {
        **provenance(device), "config_hash": run_folder.identity_of(cfg), "experiment": cfg.experiment, "task": "tune",
        "dataset": data.info.name, "model": cfg.model.name, "w_bits": w_bits, "a_bits": a_bits,
        "distill": "none" if candidate.weight is None else "soft", "seed": cfg.seed, "epochs": cfg.fit.epochs,
        "wall_s": time.perf_counter() - start, "notes": f"budget={cfg.budget}, {data.info.val_size} validation images",
        "val_top1": score.top1, "val_loss": score.loss,
        "temperature": candidate.temperature, "weight": candidate.weight,
    }  # fmt: skip
    _keep(table, row, folder)
    return score


@rank_zero_only
def _keep(table: Path, row: dict[str, Any], folder: Path) -> None:
    append_row(table, row)
    shutil.rmtree(folder, ignore_errors=True)


def _known(table: Path) -> dict[str, Score]:
    """Scores of earlier commands, by the hash of the candidate's config."""
    rows = read_rows(table) if table.is_file() else []
    return {row["config_hash"]: Score(float(row["val_top1"]), float(row["val_loss"])) for row in rows}


@rank_zero_only
def _show(found: list[Found], folder: Path) -> None:
    """The table, the line to paste and ``tuned.yaml``."""
    columns = ("Bits", "Temperature", "Weight", *(f"{n} epoch{'s' * (n > 1)}, %" for n in found[0].epochs))
    print(plain_table(columns, [row for search_ in found for row in _rows(search_)]))
    fragment = [
        "# Temperature and weight of distillation by bit width, found by task=tune on validation images.",
        "variants:",
    ]
    for search_ in found:
        print(f"{search_.label}: {' '.join(search_.overrides)}")
        fragment.append(f"  {search_.label}: [{', '.join(search_.overrides)}]")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / TUNED, "\n".join(fragment) + "\n")
    print(f"\nkept in {folder / TABLE} and {folder / TUNED}")


def _rows(found: Found) -> list[list[str]]:
    """One row a candidate, those that came furthest first, the best of them first."""
    reached = {name: sum(name in rung for rung in found.rungs) for name in found.candidates}
    order = sorted(reached, key=lambda name: (-reached[name], found.rungs[reached[name] - 1][name].order))
    rows = []
    for name in order:
        candidate = found.candidates[name]
        values = [f"{rung[name].top1:.2f}" if name in rung else "" for rung in found.rungs]
        shown = ["none", ""] if candidate.weight is None else [f"{candidate.temperature:g}", f"{candidate.weight:g}"]
        rows.append([found.label, *shown, *values])
    return rows


def _rest(weight: float) -> float:
    """What is left of 1 for the labels, without the last place's noise."""
    return round(1 - weight, 6)
