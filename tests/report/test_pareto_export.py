"""A point of the front is reproduced: the command and the file lead to the very config that was run."""

from __future__ import annotations

import csv
import io
import re
import shlex
from dataclasses import replace
from pathlib import Path

import yaml

from qtrain.config.compose import compose
from qtrain.config.experiment_file import as_experiment
from qtrain.report.pareto_export import command, front_points, pareto_csv, write_front
from qtrain.sweep.sweep_results import read_sweep
from qtrain.sweep.trial import Trial

HARD = [
    "+experiment=cifar10/resnet20_w4a4", "budget=cpu", "optimizer.lr=3.1e-05", "objective=hard", "teacher=none",
    "task=train", "fit.final_test=false", "data.val_fraction=0.1", "allocate@quantize.bits=manual", "seed=3",
    "quantize.bits.layers={layer1.0.conv1:[3,4],conv1:[8,8]}", "+callback@callbacks.bits=bits", "name='1e3'",
    "distill.hint='${distill.soft}'", "fit.freeze.layers=['layer1.*',fc]", "optimizer=sgd",
    "optimizer.weight_decay=0", "+stages.one=['fit.share=0.5','optimizer.lr=0.01']", "+stages.two=['fit.share=0.5']",
    "fit.clip_norm=null",
]  # fmt: skip


def test_front_file_composes_the_config_of_the_overrides(tmp_path: Path) -> None:
    """Groups, added groups, lists, mappings, interpolations, stages, null: one config, from a folder with a blank."""
    content, left = as_experiment(HARD)
    assert left == []
    folder = tmp_path / "a sweep" / "front"
    folder.mkdir(parents=True)
    (folder / "p1.yaml").write_text("# @package _global_\n" + yaml.safe_dump(content, sort_keys=False))
    again = compose([f"hydra.searchpath=['file://{folder.parent}']", "+front=p1"])
    assert again.identity == compose(HARD).identity


def test_last_of_several_overrides_wins() -> None:
    overrides = ["quantize.bits={weight:3,input:2}", "quantize.bits.weight=2", "fit.epochs=3", "fit.epochs=4"]
    content, _ = as_experiment(overrides)
    assert content["quantize"] == {"bits": {"weight": 2, "input": 2}} and content["fit"] == {"epochs": 4}
    assert as_experiment(["a.b={c:1}", "a.b={d:2}"])[0]["a"] == {"b": {"c": 1, "d": 2}}


def test_overrides_that_no_file_can_hold_stay_on_the_command_line() -> None:
    overrides = ["~callbacks", "allow_targets=[mine]", "hydra.searchpath=[file:///conf]", "seed=1"]
    assert as_experiment(overrides) == ({"defaults": ["_self_"], "seed": 1}, overrides[:3])


def test_command_and_file_compose_the_config_of_the_trial(sweep_folder: Path) -> None:
    """Split as a shell splits it: threads, program, then overrides of the very config; likewise that of the file."""
    sweep = read_sweep(sweep_folder)
    made = front_points(sweep, as_experiment)
    write_front(sweep, made)
    for point in made:
        threads, *program = shlex.split(point.command)
        assert threads == "OMP_NUM_THREADS=1" and program[:3] == ["python", "-m", "qtrain"]
        wanted = compose(point.trial.overrides).identity
        assert compose(program[3:]).identity == wanted
        lines = (sweep_folder / point.file).read_text().splitlines()
        short = shlex.split(next(line for line in lines if "python -m qtrain" in line).lstrip("# "))
        assert any(word.startswith("+front=p") for word in short)
        assert compose(short[4:]).identity == wanted
        assert compose(program[3:]).name == compose(short[4:]).name == point.trial.key


def test_command_sets_the_threads_of_the_trial() -> None:
    trial = Trial(id="1", key="abc", status="finished", overrides=["a='b c'"], threads=3)
    assert command(trial) == """OMP_NUM_THREADS=3 python -m qtrain 'a='"'"'b c'"'"'' name=abc"""


def test_files_of_an_earlier_front_are_removed(sweep_folder: Path) -> None:
    sweep = read_sweep(sweep_folder)
    for name in ("p7.yaml", "mine.txt"):
        (sweep_folder / "front").mkdir(exist_ok=True)
        (sweep_folder / "front" / name).write_text("x")
    write_front(sweep, front_points(sweep, as_experiment))
    assert sorted(path.name for path in (sweep_folder / "front").iterdir()) == ["mine.txt", "p1.yaml", "p2.yaml"]


def test_front_file_begins_with_its_metrics(sweep_folder: Path) -> None:
    first = front_points(read_sweep(sweep_folder), as_experiment)[0].content
    assert first.startswith(
        "# @package _global_\n# Point 1 of the front of sweep_quickstart: val top-1 96.50 %, size 8.0 kB, W4A4"
    )


def test_pareto_csv_has_metrics_bits_knobs_and_commands(sweep_folder: Path) -> None:
    sweep = read_sweep(sweep_folder)
    rows = list(csv.DictReader(io.StringIO(pareto_csv(sweep, front_points(sweep, as_experiment)))))
    # Bits of the inner layers: 4, 4, 2, 2.
    assert [(row["w_bits_mean"], row["a_bits_mean"]) for row in rows] == [("4", "4"), ("3", "3")]
    assert rows[1]["widths.layer2.0"] == "2" and rows[1]["optimizer.lr"] == "0.001" and float(rows[1]["bops"]) == 20e6
    assert all(re.match(r"OMP_NUM_THREADS=1 python -m qtrain \+experiment=quickstart ", row["command"]) for row in rows)


def test_commands_name_the_folder_of_runs_where_it_is_not_the_default(sweep_folder: Path) -> None:
    sweep = read_sweep(sweep_folder)
    for output, word in (("outputs", None), ("runs/mine", "output=runs/mine"), ("my runs", "output='my runs'")):
        other = replace(sweep, config={**sweep.config, "output": output})
        point = front_points(other, as_experiment)[0]
        for text in (point.command, next(line for line in point.content.splitlines() if "-m qtrain" in line)):
            words = [own for own in shlex.split(text.lstrip("# ")) if own.startswith("output")]
            assert words == ([word] if word else [])
