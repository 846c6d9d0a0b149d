"""A run that is killed with SIGKILL, at whatever moment, ends as if nothing had happened, bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest import param

from qtrain.tracking.loggers import WALL_CLOCK_FIELDS
from qtrain.training.checkpoint import AtomicCheckpointIO, find_resume_point, list_resume_points, read_checked
from qtrain.training.resume import ResumePoints
from qtrain.utils.json_lines import read_metrics

HERE = Path(__file__).parent
slow = pytest.mark.slow
Attempt = Callable[..., int]


@pytest.fixture(scope="module")
def attempt() -> Iterator[Attempt]:
    """Starts the tiny run once and gives its exit status (negative: the signal that ended it)."""
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [sys.executable, str(HERE / "tiny_run.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert server.stdin is not None and server.stdout is not None
    stdin, stdout = server.stdin, server.stdout

    def start(folder: Path, **job: Any) -> int:
        stdin.write(json.dumps({"folder": str(folder), **job}) + "\n")
        stdin.flush()
        while not (line := stdout.readline()).startswith('{"status"'):
            assert line, "the server died"
        return int(json.loads(line)["status"])

    yield start
    stdin.close()
    server.wait(timeout=30)


@pytest.fixture(scope="module")
def undisturbed(attempt: Attempt, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a run with these options that nobody killed."""
    done: dict[str, Path] = {}

    def get(**options: Any) -> Path:
        key = json.dumps(options, sort_keys=True)
        if key not in done:
            done[key] = tmp_path_factory.mktemp("undisturbed")
            assert attempt(done[key], **options) == 0
        return done[key]

    return get


def state(folder: Path) -> dict[str, Any]:
    """All that a run leaves behind, without what depends on the clock."""
    last = read_checked(list_resume_points(folder / "checkpoints")[-1][1])
    metric_log = last["callbacks"]["MetricLog"]
    for field in ("elapsed_s", "positions"):
        metric_log.pop(field)
    rows = read_metrics(folder / "metrics.jsonl")[0]
    rows = [{name: value for name, value in row.items() if name not in WALL_CLOCK_FIELDS} for row in rows]
    return {"final": json.loads((folder / "final.json").read_text()), "rows": rows, "checkpoint": last}


def assert_identical(a: Any, b: Any, where: str = "") -> None:
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_identical(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_identical(x, y, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    else:
        assert a == b, where


# Resume points lie at steps 3, 6, 7 (end of an epoch), 9, 12, 14, 15, 18 and 21 (the end).
MOMENTS = [
    ("batch_start", 0),  # before anything
    ("batch_end", 2),  # before the first save, a row written
    ("after_save", 3),
    ("after_save", 6),  # with a row of the same step
    ("batch_end", 6),  # a row written, its save not
    ("half_row", 5),
    ("mid_write", 3),  # the very first checkpoint
    ("mid_write", 12),
    ("before_rename", 9),
    ("batch_end", 7),  # the epoch's last batch
    ("after_save", 14),
    ("validation", 7),
    ("after_validation", 14),  # its row written, the epoch's end not saved
    ("after_epoch", 7),
    ("after_epoch", 21),  # nothing left but to end
    ("batch_end", 11),
    ("train_end", 21),
    ("test", 21),
]


@pytest.mark.parametrize(("moment", "step"), [param(*at, marks=[slow] * (at != ("mid_write", 12))) for at in MOMENTS])
def test_killed_run_ends_as_the_undisturbed_one(
    moment: str, step: int, attempt: Attempt, undisturbed: Callable[..., Path], tmp_path: Path
) -> None:
    options = {"average": True, "estimate": True}
    assert attempt(tmp_path, **options, moment=moment, step=step) == -signal.SIGKILL
    assert not (tmp_path / "final.json").exists()
    assert attempt(tmp_path, **options) == 0
    assert_identical(state(tmp_path), state(undisturbed(**options)))


@slow
@pytest.mark.parametrize("options", [{"validate": False}, {"accumulate": 2}], ids=["no validation", "accumulation"])
@pytest.mark.parametrize("steps", [(2, 5, 6), (1, 3, 10)])
def test_run_killed_several_times_ends_as_the_undisturbed_one(
    options: dict[str, Any], steps: tuple[int, ...], attempt: Attempt, undisturbed: Callable[..., Path], tmp_path: Path
) -> None:
    for step in steps:
        assert attempt(tmp_path, **options, moment="batch_end", step=step) == -signal.SIGKILL
    assert attempt(tmp_path, **options) == 0
    assert_identical(state(tmp_path), state(undisturbed(**options)))


def test_without_average_the_student_keeps_its_own_weights(undisturbed: Callable[..., Path]) -> None:
    with_average, without = state(undisturbed(average=True)), state(undisturbed())
    assert_identical(with_average["checkpoint"]["state_dict"], without["checkpoint"]["state_dict"])
    assert with_average["final"]["average"] != without["final"]["average"]


def test_run_resumes_from_the_second_newest_point_if_the_newest_is_damaged(
    attempt: Attempt, undisturbed: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert attempt(tmp_path, moment="batch_end", step=11) == -signal.SIGKILL
    (_, older), (_, newest) = list_resume_points(tmp_path / "checkpoints")
    newest.write_bytes(newest.read_bytes()[:-1000])
    assert find_resume_point(tmp_path / "checkpoints") == older
    assert str(newest) in caplog.text and "truncated" in caplog.text
    assert attempt(tmp_path) == 0
    assert_identical(state(tmp_path), state(undisturbed()))


@pytest.mark.parametrize(("moment", "code"), [("sigterm", 143), param("sigint", 130, marks=slow)])
@pytest.mark.parametrize(
    "step", [4, param(7, marks=slow), param(21, marks=slow)], ids=["mid-epoch", "last batch", "last batch of all"]
)
def test_signal_saves_and_stops_the_run(
    moment: str, code: int, step: int, attempt: Attempt, undisturbed: Callable[..., Path], tmp_path: Path
) -> None:
    assert attempt(tmp_path, average=True, moment=moment, step=step) == code
    assert list_resume_points(tmp_path / "checkpoints")[-1][0] == step
    assert attempt(tmp_path, average=True) == 0
    assert_identical(state(tmp_path), state(undisturbed(average=True)))


@slow
def test_signal_in_validation_stops_the_run_at_the_end_of_the_epoch(
    attempt: Attempt, undisturbed: Callable[..., Path], tmp_path: Path
) -> None:
    assert attempt(tmp_path, moment="sigterm_in_validation", step=14) == 143
    assert list_resume_points(tmp_path / "checkpoints")[-1][0] == 14
    assert attempt(tmp_path) == 0
    assert_identical(state(tmp_path), state(undisturbed()))


@slow
def test_killed_from_outside_at_random_times(
    attempt: Attempt, undisturbed: Callable[..., Path], tmp_path: Path
) -> None:
    """No moment of our choosing: a timer in another process. The seed only makes a failure easier to repeat."""
    chance = random.Random(0)
    start = time.perf_counter()
    assert attempt(tmp_path / "whole", average=True) == 0
    whole_s = time.perf_counter() - start
    for _ in range(8):
        if attempt(tmp_path, average=True, timer_s=chance.uniform(0.3, 1.0) * whole_s) == 0:
            break
    else:
        assert attempt(tmp_path, average=True) == 0
    assert_identical(state(tmp_path), state(undisturbed(average=True)))


@slow
@pytest.mark.parametrize(
    ("moment", "step"),
    [("batch_start", 1), ("batch_start", 5), ("mid_write", 6), ("batch_start", 11), ("mid_write", 12)],
)
def test_killed_distillation_of_a_low_bit_student(
    moment: str, step: int, attempt: Attempt, undisturbed: Callable[..., Path], tmp_path: Path
) -> None:
    """The real module, data, quantizers, teacher and hints, as ``task=train`` puts them together."""
    assert attempt(tmp_path, product=True, moment=moment, step=step) == -signal.SIGKILL
    assert attempt(tmp_path, product=True) == 0
    whole = state(undisturbed(product=True))
    assert_identical(state(tmp_path), whole)
    written = {name.split("/")[0] for row in whole["rows"] for name in row}
    assert {"scale", "flipped", "gradient", "agreement", "instability"} <= written
    assert {row["split"] for row in whole["rows"]} == {"train", "val"}
    assert not any("teacher" in name for name in whole["checkpoint"]["state_dict"])


def test_only_the_newest_resume_points_are_kept(undisturbed: Callable[..., Path]) -> None:
    folder = undisturbed(average=True) / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000018.ckpt", "step-00000021.ckpt"]


def test_another_configuration_is_refused(attempt: Attempt, tmp_path: Path) -> None:
    assert attempt(tmp_path, moment="batch_end", step=5) == -signal.SIGKILL
    point = find_resume_point(tmp_path / "checkpoints")
    assert point is not None
    with pytest.raises(ValueError, match=r"another configuration .*'tiny'.*'other'.*resume=false"):
        AtomicCheckpointIO(identity="other").load_checkpoint(point)
    for same in ("tiny", None):
        assert AtomicCheckpointIO(identity=same).load_checkpoint(point)["global_step"] == 3


@pytest.mark.parametrize(("options", "message"), [({"every_n_steps": 0}, "every_n_steps"), ({"keep": 1}, "keep")])
def test_wrong_options(options: dict[str, int], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"ResumePoints: {message} must be at least"):
        ResumePoints(folder=tmp_path, **options)  # type: ignore[arg-type]
