"""The task that builds the project's workspace in W&B, or writes its definition where W&B is out of reach.

The definition, ``workspace.json``, is written in any case. A workspace that this command has saved before is replaced,
not joined by another one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtrain.settings.run_settings import RunSettings
from qtrain.sweep.sweep_results import SweepResults, read_sweep
from qtrain.sweep.wandb_sweep import sweep_group
from qtrain.tracking.wandb_client import named_knobs
from qtrain.tracking.wandb_mode import wandb_mode
from qtrain.utils.atomic_write import write_text
from qtrain.utils.compat import set_workspace_identity_, workspace_definition
from qtrain.utils.errors import ConfigError

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

log = logging.getLogger(__name__)

WORKSPACE = "workspace.json"
HOST_TIMEOUT_S = 3.0


def run(settings: RunSettings) -> dict[str, Any]:
    """Save the workspace that ``settings.review`` describes; returns the path of its definition and, once saved, its
    URL.
    """
    review = settings.review
    sweep = _sweep(review.folder)
    # Its client has to be there for the definition as well: it is the one that knows the form.
    possible, reason = wandb_mode(mode="online", host_timeout_s=HOST_TIMEOUT_S)
    try:
        from qtrain.tracking.review_panels import make_workspace
    except ModuleNotFoundError as error:
        raise ConfigError(f"task=review: {error.name} is not installed (pip install 'qtrain[wandb]')") from error

    group = review.group or (sweep_group(sweep.config, sweep.folder) if sweep else None)
    workspace = make_workspace(
        entity=review.entity or "",
        project=review.project,
        name=f"qtrain: {group or 'all runs'}",
        accuracy=review.accuracy or ("val_top1" if sweep else "top1"),
        group=group,
        knobs=review.knobs if review.knobs is not None else _knobs(sweep),
    )
    path = Path(settings.run_dir) / WORKSPACE
    _take_over(workspace, path)
    url = None
    if possible == "online":
        try:
            url = _save(workspace)
        except Exception as error:  # of the network, of the server, of rights: the client has a kind for each
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, workspace_definition(workspace) + "\n")
    if url is None:
        log.info("W&B: the workspace is not saved: %s; the same command saves it where W&B can be reached", reason)
    print(f"workspace: {url or path}")
    return {"workspace": str(path), "url": url}


def _sweep(folder: str | None) -> SweepResults | None:
    if folder is None:
        return None
    try:
        return read_sweep(Path(folder))
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(str(error).replace("report.folder", "review.folder")) from error


def _knobs(sweep: SweepResults | None) -> Sequence[str]:
    """The knobs that any of the sweep's trials had, as W&B names them."""
    return list(named_knobs({name: True for trial in (sweep.trials if sweep else ()) for name in trial.knobs}))


def _save(workspace: Workspace) -> str:
    import wandb

    if not workspace.entity:
        workspace.entity = wandb.Api().default_entity or ""
    workspace.save()
    return str(workspace.url)


def _take_over(workspace: Workspace, path: Path) -> None:
    """Make ``workspace`` the one that an earlier call has saved, if its definition in ``path`` says that it was."""
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    same = before.get("project") == workspace.project and workspace.entity in ("", before.get("entity"))
    if same and before.get("id"):
        workspace.entity = before["entity"]
        set_workspace_identity_(workspace, name=before["name"], id=before["id"])
