"""The task that shows all runs below a folder, or a sweep, on one page."""

from pathlib import Path
from typing import Any

from qtrain.config.experiment_file import as_experiment
from qtrain.report.live_table import print_front
from qtrain.report.run_page import write_report
from qtrain.report.sweep_page import write_sweep_report
from qtrain.report.table import print_summary
from qtrain.settings.run_settings import RunSettings
from qtrain.sweep.sweep_results import is_sweep, read_sweep


def run(settings: RunSettings) -> dict[str, Any]:
    """Write the report of ``settings.report.folder`` into that folder; returns its path and how many runs it shows.

    The folder of a sweep gets the page of the sweep.
    """
    folder = Path(settings.report.folder)
    if is_sweep(folder):
        sweep = read_sweep(folder)
        print_front(sweep.trials, sweep.objectives, space=sweep.space)
        page = write_sweep_report(folder, as_experiment=as_experiment)
        print(f"report: {page}")
        return {"report": str(page), "trials": len(sweep.trials), "front": len(sweep.front)}
    page, finished, unfinished = write_report(folder)
    print_summary(folder)
    print(f"report: {page}")
    return {"report": str(page), "runs": finished, "unfinished": unfinished}
