"""The task that runs many trials and shows which of them are worth having."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from qtrain.config.compose import compose, from_plain
from qtrain.config.experiment_file import as_experiment
from qtrain.pipeline.results import check_results
from qtrain.report.live_table import LiveTable, print_front
from qtrain.report.sweep_page import write_sweep_report
from qtrain.report.sweep_rows import append_sweep_rows
from qtrain.settings.run_settings import RunSettings
from qtrain.sweep.evaluate_front import starts
from qtrain.sweep.run_sweep import run_sweep
from qtrain.sweep.sweep_results import read_sweep
from qtrain.sweep.trial_store import sweep_hash
from qtrain.sweep.wandb_sweep import tell_sweep


def run(settings: RunSettings, overrides: Sequence[str] = ()) -> dict[str, float]:
    """Run the sweep ``settings``, that ``overrides`` led to, print its front and write its page.

    Returns how many trials ended how, and each objective's best value.
    """
    if settings.results:
        check_results(settings.results)
    trial_store = run_sweep(
        settings, overrides, compose=partial(compose, typed=overrides), read=from_plain, table=LiveTable
    )
    sweep = read_sweep(trial_store.folder)
    if settings.sweep.test_front and settings.results:
        append_sweep_rows(
            Path(settings.results),
            sweep,
            starts={trial.id for trial in starts(settings, trial_store)},
            config_hash=sweep_hash(settings),
        )
    print_front(sweep.trials, sweep.objectives, space=sweep.space)
    spent = sweep.spending
    print(
        f"\n{spent.counted()}; {spent.epochs:g} epochs, full training of all {spent.full_epochs:g} ({spent.share:.0%})"
    )
    print(f"sweep: {write_sweep_report(trial_store.folder, as_experiment=as_experiment)}")
    tell_sweep(settings, sweep)
    return sweep.totals
