"""A student that goes on from its parent's stages is the student that trained them all, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qtrain.config.compose import compose
from qtrain.pipeline import train
from qtrain.pipeline.stages import STATE, Stage
from qtrain.settings.run_settings import RunSettings
from qtrain.sweep.bit_widths import BitWidths
from qtrain.sweep.inherit_stages import inherit_stages
from qtrain.sweep.population import PopulationSearcher
from qtrain.sweep.search import Population
from qtrain.sweep.space import Space

TINY = """
    trainer=cpu data.max_train=128 data.max_test=32 data.val_fraction=0.25 model=cifar_resnet8 model.width=0.25
    optimizer=adam optimizer.lr=0.01 fit.epochs=2 data.batch_size=32 full_precision.epochs=1 fit.reestimate_bn=1
    quantize.calibration_batches=1 quantize.weight.init=range quantize.input.init=range fit.log_every_steps=1
    fit.health_every_steps=0 fit.final_test=false
""".split()
LAYERS = (
    "conv1 layer1.0.conv1 layer1.0.conv2 layer2.0.conv1 layer2.0.conv2 layer3.0.conv1 layer3.0.conv2 linear".split()
)
SCHEDULE = {"_target_": "qtrain.schedules.cosine.Cosine", "start": 1.0, "end": 0.0}


def lines() -> tuple[list[str], list[str]]:
    """Overrides of a student of one stage, and of one that goes on from it with other bits."""
    searcher = PopulationSearcher(
        Space({"widths": BitWidths(choices=[2, 4])}, layers=LAYERS),
        Population(size=2, quantile=0.5, change=1.0),
        objectives={"top1": "max"},
        seed=0,
        epochs=2,
        lr_schedule=SCHEDULE,
    )
    for id in ("good", "bad"):
        searcher.suggest(id)
    for id, top1 in (("good", 2.0), ("bad", 1.0)):
        searcher.on_trial_complete(id, {"top1": top1})
    searcher.suggest("stays")
    searcher.suggest("follows")
    assert searcher.parent("follows") == "good"
    first, both = searcher.overrides("good"), searcher.overrides("follows")
    assert both[0] == first[0]
    assert both[1] != both[0]
    return first, both


def config(cache: Path, folder: Path, stages: list[str]) -> RunSettings:
    return compose([*TINY, f"full_precision.folder={cache}", f"run_dir={folder}", *stages])


def rows(folder: Path) -> list[dict[str, Any]]:
    kept = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("time", "images_per_s")} for row in kept]


@pytest.mark.slow
def test_who_follows_equals_the_run_of_all_its_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, alone, parent, child = (tmp_path / name for name in ("cache", "alone", "parent", "child"))
    first, both = lines()
    train.train(config(cache, alone, both))

    train.train(config(cache, parent, first), keep_last=True)
    inherit_stages(parent, child)
    inherit_stages(parent, child)  # a trial that was killed comes here again
    begun: list[str] = []
    run_stage = train.run_stage

    def counted(stage: Stage, *arguments: Any) -> Any:
        begun.append(stage.name)
        return run_stage(stage, *arguments)

    monkeypatch.setattr(train, "run_stage", counted)
    train.train(config(cache, child, both), keep_last=True)
    assert begun == ["g2"], "the parent's stage is not trained again"

    one, other = (load_file(folder / "student.safetensors") for folder in (alone, child))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert rows(alone) == rows(child)
    assert [row["epoch"] for row in rows(child) if row["split"] == "val"] == [0, 1]
    bits = {name: int(t) for name, t in one.items() if name.endswith("conv1.weight_quantizer.bits")}
    before = {n: int(t) for n, t in load_file(parent / "student.safetensors").items() if n in bits}
    assert bits != before, "bits have changed while it trained"
    assert sorted(path.parent.name for path in child.rglob(STATE)) == ["1-g1", "2-g2"], "and it may be followed itself"
    states = [next(folder.rglob(f"1-g1/{STATE}")) for folder in (parent, child)]
    assert states[0].stat().st_ino == states[1].stat().st_ino, "one file, however many follow"


def test_states_are_copied_where_there_are_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = tmp_path / "parent" / "stages" / "1-g1" / STATE
    state.parent.mkdir(parents=True)
    state.write_bytes(b"state")
    (tmp_path / "parent" / "metrics.jsonl").write_text("{}\n")

    def refuse(*arguments: Any) -> None:
        raise OSError("no links here")

    monkeypatch.setattr("os.link", refuse)
    inherit_stages(tmp_path / "parent", tmp_path / "child")
    assert (tmp_path / "child" / "stages" / "1-g1" / STATE).read_bytes() == b"state"
    assert (tmp_path / "child" / "metrics.jsonl").read_text() == "{}\n"


def test_a_parent_without_stages_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has left no stages to go on from; start it again with overwrite=true"):
        inherit_stages(tmp_path, tmp_path / "child")
