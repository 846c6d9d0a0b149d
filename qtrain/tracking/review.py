"""The project's workspace in W&B: built, saved, or kept as its definition where W&B is out of reach.

The definition, ``workspace.json``, is written in any case. A workspace that an earlier call has saved is replaced, not
joined by another one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qtrain.settings.run_settings import ReviewSettings
from qtrain.tracking.wandb_mode import wandb_mode
from qtrain.utils.atomic_write import write_text
from qtrain.utils.compat import set_workspace_identity_, workspace_definition
from qtrain.utils.errors import ConfigError

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

log = logging.getLogger(__name__)

HOST_TIMEOUT_S = 3.0


def build_workspace(
    review: ReviewSettings, path: Path, *, group: str | None, accuracy: str, knobs: Sequence[str]
) -> str | None:
    """Save the workspace of ``review`` and write its definition to ``path``; returns its URL, if it could be saved.

    It shows ``group`` alone, or all runs; ``accuracy`` is the metric on its axes, ``knobs`` are further axes.
    """
    # The client has to be there for the definition as well: it is the one that knows the form.
    possible, reason = wandb_mode(mode="online", host_timeout_s=HOST_TIMEOUT_S)
    try:
        from qtrain.tracking.review_panels import make_workspace
    except ModuleNotFoundError as error:
        raise ConfigError(f"task=review: {error.name} is not installed (pip install 'qtrain[wandb]')") from error

    workspace = make_workspace(
        entity=review.entity or "",
        project=review.project,
        name=f"qtrain: {group or 'all runs'}",
        accuracy=accuracy,
        group=group,
        knobs=knobs,
    )
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
    return url


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
