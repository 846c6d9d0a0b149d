"""Real sweeps of the digits: a killed worker, a poisoned trial, duplicates, a trial rerun alone, a killed driver."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch

from qtrain.config.compose import compose
from qtrain.pipeline.results import read_results
from qtrain.pipeline.run_cache import RunCache
from qtrain.run_task import run_task
from qtrain.sweep import engine
from qtrain.sweep.search_log import SEARCH, SearchLog
from qtrain.sweep.trial import Trial, read_trials
from qtrain.sweep.trial_workers import WorkerSettings
from qtrain.tracking.loggers import WALL_CLOCK_FIELDS
from qtrain.utils.errors import ConfigError
from qtrain.utils.json_lines import read_metrics

TINY = """
    task=sweep trainer=cpu data.max_train=320 data.max_test=40 model=cifar_resnet8 model.width=0.25 fit.epochs=2
    full_precision.epochs=1 fit.reestimate_bn=0 fit.health_every_steps=0 fit.log_every_steps=1
    fit.checkpoint_every_steps=1 quantize.calibration_batches=1 sweep.val_fraction=0.2
""".split()


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        ray.init(
            address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
            object_store_memory=80 * 1024**2, _temp_dir=folder,
        )  # fmt: skip
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def typed(folder: Path, cache: Path, *more: str) -> list[str]:
    return [*TINY, f"output={folder}", f"full_precision.folder={cache}", *more]


def sweep(folder: Path, cache: Path, *more: str) -> tuple[dict[str, Any], list[Trial]]:
    overrides = typed(folder, cache, *more)
    metrics = run_task(compose(overrides), overrides)
    return metrics, read_trials(folder / "adhoc" / "sweep")


def rows(folder: Path) -> list[dict[str, Any]]:
    """What a run logged, without what the clock says."""
    return [
        {k: v for k, v in row.items() if k not in WALL_CLOCK_FIELDS}
        for row in read_metrics(folder / "metrics.jsonl")[0]
    ]


def alone(trial: Trial, folder: Path) -> Path:
    """The run of ``trial`` by its own overrides, in a process of its own; returns its folder."""
    command = [sys.executable, "-m", "qtrain", *trial.overrides, f"output={folder}", "name=alone"]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": str(trial.threads)})
    (place,) = folder.glob("*/alone")
    return place


def repeated(trial: Trial, folder: Path) -> Path:
    """As :func:`alone`, in this process, for what is not about processes."""
    overrides = [*trial.overrides, f"output={folder}", "name=alone"]
    before = torch.get_num_threads()
    torch.set_num_threads(trial.threads)
    try:
        run_task(compose(overrides), overrides)
    finally:
        torch.set_num_threads(before)
    (place,) = folder.glob("*/alone")
    return place


@pytest.fixture(scope="module")
def swept(cluster: None, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Trial]]:
    """Six random trials of two good values and a poisonous one; three of them must be duplicates."""
    folder = tmp_path_factory.mktemp("swept")
    space = "+sweep.space={optimizer.lr: [0.05, 0.01, 1.0e+18]}"
    more = [space, "sweep.trials=9", "sweep.parallel=2", f"results={folder}/results.csv"]
    metrics, trials = sweep(folder, cache, *more)
    assert metrics["finished"] == 2 and metrics["failed"] == 1 and metrics["duplicate"] == 6
    assert metrics["best/top1"] == max(trial.metrics["top1"] for trial in trials if trial.status == "finished")
    return folder / "adhoc" / "sweep", trials


def test_a_trial_that_fails_says_why_and_stops_no_other(swept: tuple[Path, list[Trial]]) -> None:
    folder, trials = swept
    (failed,) = (trial for trial in trials if trial.status == "failed")
    assert failed.knobs == {"optimizer.lr": 1e18}
    assert failed.reason is not None and failed.reason.startswith("StopOnNonFinite: the loss is not finite at step")
    assert "\n" not in failed.reason
    assert "Traceback" in (folder / "trials" / failed.key / "trial.log").read_text()
    for trial in trials:
        if trial.status == "finished":
            assert trial.epochs == 2 and trial.threads == 1
            assert {"top1", "best_top1", "loss", "size_bytes", "bops", "effective_bits"} <= trial.metrics.keys()
            assert trial.layer_bits["layer1.0.conv1"] == [4, 4]


def test_a_worker_keeps_no_more_than_it_may(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Stands in a worker of Ray, without one: what the setting says reaches what is kept."""
    kept: list[float] = []

    def run(settings: object, proposal: object, *, store: RunCache, **rest: object) -> Trial:
        kept.append(store.most_bytes)
        return Trial(id="1", key="k", status="finished")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(engine, "_STORE", RunCache())
    monkeypatch.setattr(engine, "run_trial", run)
    monkeypatch.setattr(engine, "read_trial_config", lambda *arguments, **options: {})
    monkeypatch.setattr(engine.tune, "report", lambda metrics: None)
    for gigabytes in (0.0, 1.5):
        setting = WorkerSettings(
            folder=str(tmp_path), storage="", resources={}, threads=1, workers=1, max_failures=0,
            cache_bytes=gigabytes * 1e9, cwd=str(tmp_path), read=lambda plain: None,  # type: ignore[arg-type, return-value]
        )  # fmt: skip
        engine.train_trial({"proposal": {"id": "1", "key": "k", "overrides": [], "knobs": {}, "parent": None}}, setting)
    assert kept == [0.0, 1.5e9]


def test_trials_say_how_much_memory_their_workers_took(swept: tuple[Path, list[Trial]]) -> None:
    """A process that has imported torch holds more than 100 MB; a duplicate ran in none."""
    assert all((trial.peak_bytes > 1e8) == (trial.status != "duplicate") for trial in swept[1])


def test_an_identical_config_is_run_once(swept: tuple[Path, list[Trial]]) -> None:
    folder, trials = swept
    by_id = {trial.id: trial for trial in trials}
    assert sorted(by_id) == [f"{n:04d}" for n in range(1, 10)]
    assert len(list((folder / "trials").iterdir())) == 3
    for trial in trials:
        if trial.status == "duplicate":
            assert trial.of is not None
            first = by_id[trial.of]
            assert (first.key, first.knobs) == (trial.key, trial.knobs) and first.status != "duplicate"
            assert trial.epochs == trial.train_s == 0
            assert first.status == "failed" or trial.metrics["top1"] == first.metrics["top1"]


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_the_best_trial_of_a_sweep_for_a_target_is_exported_and_verified(tmp_path: Path, cache: Path) -> None:
    space = ["+knob@sweep.space.widths=bit_widths", "sweep.space.widths.choices=[4,8]", "sweep.space.widths.per=model"]
    found = ["search@sweep.search=grid", "sweep.trials=2", "sweep.objectives={top1: max, size_bytes: min}"]
    metrics, trials = sweep(tmp_path, cache, "target=onnxruntime", *space, *found, "fit.epochs=1")
    assert metrics["finished"] == 2, [trial.reason for trial in trials]
    assert {trial.layer_bits["layer1.0.conv1"][0] for trial in trials} == {4, 8}
    best = max(trials, key=lambda trial: trial.metrics["top1"])
    folder = tmp_path / "adhoc" / "sweep" / "trials" / best.key
    run_task(compose(["task=export", f"checkpoint={folder}", "export.images=20", f"output={tmp_path}"]))
    verdict = json.loads((folder / "export" / "verify.json").read_text())
    assert verdict["passed"] and verdict["top1"]["student"] == verdict["top1"]["onnxruntime"]
    layers = [layer["layer"] for tier in verdict["tiers"] if tier["name"] == "onnxruntime" for layer in tier["layers"]]
    assert any(".add" in layer for layer in layers), "sums are quantized, as the target wants it"


@pytest.mark.slow
def test_the_best_trial_rerun_alone_is_the_same_bit_for_bit(swept: tuple[Path, list[Trial]], tmp_path: Path) -> None:
    folder, trials = swept
    best = max((t for t in trials if t.status == "finished"), key=lambda trial: trial.metrics["top1"])
    again = alone(best, tmp_path)
    assert rows(again) == rows(folder / "trials" / best.key)
    assert rows(again)[-1]["top1"] == best.metrics["top1"]
    one, two = ((place / "student.safetensors").read_bytes() for place in (again, folder / "trials" / best.key))
    assert one == two


def test_the_front_is_evaluated_on_test_images_and_no_other_trial(swept: tuple[Path, list[Trial]]) -> None:
    folder, trials = swept
    tested = [trial for trial in trials if "test_top1" in trial.metrics]
    finished = [trial for trial in trials if trial.status == "finished"]
    best = max(trial.metrics["top1"] for trial in finished)
    assert {trial.id for trial in tested} == {trial.id for trial in finished if trial.metrics["top1"] == best}
    for trial in finished:
        summary = json.loads((folder / "trials" / trial.key / "summary.json").read_text())
        assert summary["top1"] is None and summary["fp_top1"] is None
    assert (folder / "sweep.html").is_file() and (folder / "pareto.csv").is_file()


def test_the_front_and_what_was_spent_are_rows_of_the_results_file(swept: tuple[Path, list[Trial]]) -> None:
    folder, trials = swept
    *models, spent = read_results(folder.parent.parent / "results.csv")
    tested = {trial.id: trial for trial in trials if "test_top1" in trial.metrics}
    assert {row["name"] for row in models} == tested.keys()
    for row in models:
        trial = tested[row["name"]]
        assert float(row["top1"]) == pytest.approx(trial.metrics["test_top1"], rel=1e-5)
        assert (row["config_hash"], row["sweep"], row["start"]) == (trial.key, "sweep", "false")
    assert sorted(int(row["point"]) for row in models) == list(range(1, 1 + len(models)))
    assert spent["notes"].startswith("9 trials: 2 finished, 1 failed, 6 duplicates") and not spent["top1"]
    assert float(spent["epochs"]) < float(spent["full_epochs"]) == 18


@pytest.mark.slow
def test_a_killed_worker_costs_time_and_nothing_else(cluster: None, cache: Path, tmp_path: Path) -> None:
    killed: list[int] = []
    ended = threading.Event()

    def kill() -> None:
        """End the trial's process once it has a resume point."""
        while not killed and not ended.wait(0.02):
            for lock in (tmp_path / "sweep").glob("adhoc/sweep/trials/*/.holder"):
                steps = len(list(lock.parent.glob("checkpoints/*.ckpt")))
                try:
                    pid = json.loads(lock.read_text())["pid"]
                except (OSError, ValueError):
                    continue
                if steps and pid not in killed:
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)

    threading.Thread(target=kill, daemon=True).start()
    more = ["+sweep.space={optimizer.lr: [0.03]}", "sweep.trials=1", "fit.epochs=6", "sweep.test_front=false"]
    try:
        _, (trial,) = sweep(tmp_path / "sweep", cache, *more)
    finally:
        ended.set()
    assert len(killed) == 1
    assert (trial.status, trial.epochs) == ("finished", 6)
    again = rows(repeated(trial, tmp_path / "alone"))
    assert again == rows(tmp_path / "sweep" / "adhoc" / "sweep" / "trials" / trial.key)


@pytest.mark.slow
def test_a_worker_that_dies_too_often_is_a_failed_trial(cluster: None, cache: Path, tmp_path: Path) -> None:
    stop = threading.Event()

    def kill() -> None:
        while not stop.wait(0.02):
            for lock in tmp_path.glob("adhoc/sweep/trials/*/.holder"):
                try:
                    os.kill(json.loads(lock.read_text())["pid"], signal.SIGKILL)
                except (OSError, ValueError):
                    continue

    threading.Thread(target=kill, daemon=True).start()
    try:
        metrics, (trial,) = sweep(
            tmp_path, cache, "+sweep.space={optimizer.lr: [0.03]}", "sweep.trials=1", "sweep.max_failures=1"
        )
    finally:
        stop.set()
    assert metrics["failed"] == 1 and trial.status == "failed"
    assert trial.reason is not None and "died" in trial.reason and "\n" not in trial.reason


@pytest.mark.slow
def test_asha_stops_trials_and_tells_the_search(cluster: None, cache: Path, tmp_path: Path) -> None:
    more = [
        "+sweep.space={optimizer.lr: [0.05, 1.0e-7]}", "search@sweep.search=grid", "scheduler@sweep.scheduler=asha",
        "sweep.scheduler.reduction=2", "fit.epochs=4", "sweep.parallel=1", "sweep.test_front=false", "seed=3",
    ]  # fmt: skip
    _, trials = sweep(tmp_path, cache, *more)
    by_rate = {trial.knobs["optimizer.lr"]: trial for trial in trials}
    assert by_rate[0.05].status == "finished"
    events = SearchLog(tmp_path / "adhoc" / "sweep").events
    if by_rate[1e-7].status == "stopped":  # it came second
        assert by_rate[1e-7].epochs < 4 and "scheduler" in str(by_rate[1e-7].reason)
    assert {event.id for event in events if event.kind == "told"} == {"0001", "0002"}
    reported = [event.metrics["epochs"] for event in events if event.kind == "reported" and event.metrics]
    assert reported and max(reported) < 4, "the last epoch is told by the end"


@pytest.mark.slow
def test_a_population_trains_in_generations(cluster: None, cache: Path, tmp_path: Path) -> None:
    """The second generation goes on from the first, and a run of all stages of a line is its last trial."""
    more = [
        "+sweep.space={optimizer.lr: [0.01, 0.03, 0.05]}", "search@sweep.search=population", "sweep.search.size=3",
        "sweep.search.quantile=0.34", "sweep.search.change=1.0", "scheduler@sweep.scheduler=none",
        "sweep.test_front=false",
    ]  # fmt: skip
    _, trials = sweep(tmp_path / "sweep", cache, *more)
    ran = [trial for trial in trials if trial.status == "finished"]
    assert len(trials) == 6 and [trial.knobs["generation"] for trial in trials] == [1, 1, 1, 2, 2, 2]
    second = [trial for trial in ran if trial.knobs["generation"] == 2]
    assert second and all(trial.epochs == 2 for trial in second)
    last = second[-1]
    again = rows(repeated(last, tmp_path / "alone"))
    assert again == rows(tmp_path / "sweep" / "adhoc" / "sweep" / "trials" / last.key)


@pytest.mark.slow
def test_a_trial_of_two_workers_is_the_run_of_two_devices(cluster: None, cache: Path, tmp_path: Path) -> None:
    more = ["+sweep.space={optimizer.lr: [0.03]}", "sweep.trials=1", "sweep.workers=2", "sweep.test_front=false"]
    _, (trial,) = sweep(tmp_path / "sweep", cache, *more)
    assert (trial.status, trial.epochs) == ("finished", 2), trial.reason
    assert "trainer.devices=2" in trial.overrides
    again = rows(alone(trial, tmp_path / "alone"))
    assert again[-1]["top1"] == trial.metrics["top1"]
    assert again == rows(tmp_path / "sweep" / "adhoc" / "sweep" / "trials" / trial.key)


@pytest.mark.slow
def test_time_that_is_over_stops_trials_and_more_time_goes_on_with_them(
    cluster: None, cache: Path, tmp_path: Path
) -> None:
    more = ["+sweep.space={optimizer.lr: [0.03]}", "sweep.trials=1", "fit.epochs=400", "sweep.test_front=false"]
    trials: list[Trial] = []
    for budget in range(10, 400, 10):  # a busy machine takes long to begin
        _, trials = sweep(tmp_path, cache, *more, f"sweep.time_budget_s={budget}")
        if trials and trials[0].epochs:
            break
    (trial,) = trials
    assert (trial.id, trial.status, trial.reason) == ("0001", "stopped", "the time budget was over")
    # The same time again is over at once; more of it goes on with the same trial, from its resume point.
    _, (same,) = sweep(tmp_path, cache, *more, f"sweep.time_budget_s={budget}")
    assert same == trial
    later = trial
    for longer in range(10, 400, 10):
        _, (later,) = sweep(tmp_path, cache, *more, f"sweep.time_budget_s={budget + longer}")
        if later.epochs > trial.epochs:
            break
    assert (later.id, later.key) == (trial.id, trial.key) and later.epochs > trial.epochs


def test_a_folder_with_another_sweep_is_refused(swept: tuple[Path, list[Trial]], cache: Path) -> None:
    with pytest.raises(ConfigError, match=r"^run_dir: .* holds a sweep of another config"):
        sweep(swept[0].parent.parent, cache, "+sweep.space={optimizer.lr: [0.5]}", "sweep.trials=9")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("sweep.resources.cpu=64", "sweep.resources.cpu: a trial asks for 64 and no machine has more than 2"),
        ("sweep.resources.gpu=0.5", "sweep.resources.gpu: a trial asks for 0.5 and no machine has more than 0"),
        ("sweep.storage=/proc/nowhere", "sweep.storage: cannot write to /proc/nowhere"),
    ],
)
def test_what_cannot_be_is_said_before_the_first_trial(
    cluster: None, cache: Path, tmp_path: Path, more: str, message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        sweep(tmp_path, cache, "+sweep.space={optimizer.lr: [0.5]}", more)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "adhoc" / "sweep" / "trials").exists()


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qtrain.sweep.ray_cluster import check_folder

    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=5_000_000))
    with pytest.raises(ConfigError, match=r"^run_dir: .* has 5 MB left, and a sweep needs at least 67; free some"):
        check_folder(tmp_path, "run_dir")


@pytest.mark.slow
def test_a_driver_that_is_stopped_or_killed_is_taken_up(cache: Path, tmp_path: Path) -> None:
    """SIGTERM after the first trial, SIGKILL after the next, then to the end; nothing is done twice."""
    folder = tmp_path / "adhoc" / "sweep"
    rates = "0.01,0.02,0.03,0.04"
    more = [
        f"+sweep.space={{optimizer.lr: [{rates}]}}", "search@sweep.search=grid", "sweep.parallel=1", "fit.epochs=3",
        "sweep.test_front=false",
    ]  # fmt: skip
    command = [sys.executable, "-m", "qtrain", *typed(tmp_path, cache, *more)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": tempfile.gettempdir()}

    def run_until(trials: int, signum: int | None) -> tuple[int, str]:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        while signum is not None and process.poll() is None and len(read_trials(folder)) < trials:
            time.sleep(0.02)
        if signum is not None:
            process.send_signal(signum)
        output = process.communicate(timeout=300)[0]
        return process.returncode, output

    code, output = run_until(1, signal.SIGTERM)
    assert code == 128 + signal.SIGTERM, output
    assert "stopped by SIGTERM" in output and "the same command" in output
    before = {
        trial.id: (folder / "trials" / trial.key / "trial.json").stat().st_mtime_ns for trial in read_trials(folder)
    }
    assert before

    code, output = run_until(len(before) + 1, signal.SIGKILL)
    assert code == -signal.SIGKILL, output
    for lock in folder.glob("trials/*/.holder"):  # workers go with their driver
        if content := lock.read_text():
            _wait_for_the_end(json.loads(content)["pid"])
    before |= {
        trial.id: (folder / "trials" / trial.key / "trial.json").stat().st_mtime_ns for trial in read_trials(folder)
    }

    code, output = run_until(4, None)
    assert code == 0, output
    trials = {trial.id: trial for trial in read_trials(folder)}
    assert sorted(trials) == [f"{n:04d}" for n in range(1, 5)]
    assert all(trial.status == "finished" and trial.epochs == 3 for trial in trials.values())
    assert {trial.knobs["optimizer.lr"] for trial in trials.values()} == {float(rate) for rate in rates.split(",")}
    assert before.items() <= when_ended(folder).items(), "not run again"
    asked = [event.id for event in SearchLog(folder).events if event.kind == "asked"]
    assert asked == sorted(set(asked)) == sorted(trials)
    lines = [json.loads(line) for line in (folder / SEARCH).read_text().splitlines()]
    assert sum(line["kind"] == "begin" for line in lines) == 4  # and this test's own look


def when_ended(folder: Path) -> dict[str, int]:
    """When each trial wrote what became of it, by id."""
    return {t.id: (folder / "trials" / t.key / "trial.json").stat().st_mtime_ns for t in read_trials(folder)}


def _wait_for_the_end(pid: int) -> None:
    end = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists():
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        if state == "Z":
            return
        assert time.monotonic() < end, f"worker {pid} has outlived its driver"
        time.sleep(0.1)
