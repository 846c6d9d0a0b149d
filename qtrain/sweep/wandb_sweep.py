"""What came of a sweep, as one run in W&B beside those of its trials: tables, page, pictures, models."""

from collections.abc import Callable, Mapping
from pathlib import Path

from qtrain.settings.run_files import STUDENT, TRIALS
from qtrain.settings.run_identity import recorded
from qtrain.settings.run_settings import RunSettings
from qtrain.sweep.sweep_results import RUNS, SweepResults
from qtrain.sweep.trial import Trial
from qtrain.tracking.run_tracking import student_name
from qtrain.tracking.wandb_client import named_knobs
from qtrain.tracking.wandb_run import WandbRun

PAGE_FILES = ("*.html", "*.png", "*.csv", "*.yaml", TRIALS, "front/*.yaml")
"""Files of a sweep's folder that make up its report."""


def log_sweep(run: WandbRun, sweep: SweepResults, *, name: str, student: Callable[[Trial], tuple[str, Path]]) -> None:
    """Tell ``run`` of ``sweep``, whose artifacts bear its ``name``; the run is left open.

    The tables ``trials`` and ``pareto``; the models of the front, each by itself as the artifact that its trial made,
    which ``student`` gives (name and file), so that W&B shows which runs the sweep chose; all of them together; and the
    report: page, pictures, and the files of trials and front.
    """
    folder = sweep.folder
    run.replay(())  # it has no curves
    run.summarize(sweep.totals)
    run.log_table("trials", [_row(trial) for trial in sweep.trials])
    run.log_table("pareto", [_row(trial) for trial in sweep.front])
    models: dict[str, Path] = {}
    for number, trial in enumerate(sweep.front):
        artifact, file = student(trial)
        if file.is_file():
            run.use_files({file.name: file}, name=artifact, kind="model")
            models[f"{number}-{trial.id}{file.suffix}"] = file
    if models:
        about = {trial.id: trial.metrics for trial in sweep.front}
        run.keep_files(models, name=f"front-{name}", kind="model", about=about)
    pages = [path for pattern in PAGE_FILES for path in sorted(folder.glob(pattern))]
    if pages:
        files = {path.relative_to(folder).as_posix(): path for path in pages}
        run.keep_files(files, name=f"sweep-{name}", kind="report")


def _row(trial: Trial) -> dict[str, object]:
    knobs = {f"knob {name}": value for name, value in named_knobs(trial.knobs).items()}
    head = {"id": trial.id, "status": trial.status, "reason": trial.reason, "of": trial.of, "epochs": trial.epochs}
    return {**head, **trial.metrics, **knobs, "key": trial.key, "overrides": " ".join(trial.overrides)}


def tell_sweep(settings: RunSettings, sweep: SweepResults) -> None:
    """Log what came of ``sweep``, of the config ``settings``, as a run of its own in the group of its trials."""
    folder, runs = sweep.folder, sweep.folder / RUNS
    for chosen in settings.logger.values():
        if chosen.target is not WandbRun:
            continue
        group = sweep_group(settings.plain, folder)
        config = {**recorded(settings.plain), "sweep": settings.plain["sweep"]}
        run: WandbRun = chosen.build()(folder=folder, config=config, group=group, job_type="sweep", name=group)

        def student(trial: Trial) -> tuple[str, Path]:
            return student_name(settings.experiment, runs / trial.key), runs / trial.key / STUDENT

        log_sweep(run, sweep, name=group, student=student)
        run.finalize("success")


def sweep_group(config: Mapping[str, object], folder: Path) -> str:
    """The group in W&B of the sweep in ``folder``, of this resolved ``config``, and of its trials."""
    return str(config.get("name") or config.get("experiment") or folder.resolve().name)
