"""The task that builds the project's workspace in W&B, or writes its definition where W&B is out of reach."""

from pathlib import Path

from qtrain.settings.run_settings import RunSettings
from qtrain.sweep.sweep_results import SweepResults, read_sweep
from qtrain.sweep.wandb_sweep import sweep_group
from qtrain.tracking.review import build_workspace
from qtrain.tracking.wandb_client import named_knobs
from qtrain.utils.errors import ConfigError

WORKSPACE = "workspace.json"


def run(settings: RunSettings) -> dict[str, str | None]:
    """Save the workspace that ``settings.review`` describes; returns the path of its definition, and its URL."""
    review = settings.review
    sweep = _sweep(review.folder)
    known = named_knobs({name: True for trial in (sweep.trials if sweep else ()) for name in trial.knobs})
    path = Path(settings.run_dir) / WORKSPACE
    url = build_workspace(
        review,
        path,
        group=review.group or (sweep_group(sweep.config, sweep.folder) if sweep else None),
        accuracy=review.accuracy or ("val_top1" if sweep else "top1"),
        knobs=review.knobs if review.knobs is not None else list(known),
    )
    print(f"workspace: {url or path}")
    return {"workspace": str(path), "url": url}


def _sweep(folder: str | None) -> SweepResults | None:
    if folder is None:
        return None
    try:
        return read_sweep(Path(folder))
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(str(error).replace("report.folder", "review.folder")) from error
