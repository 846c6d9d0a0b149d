"""The workspace: what its panels show, saved to a server or written down, and replaced when it is saved again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qtrain.config.compose import compose
from qtrain.sweep.trial import Trial, append_trial
from qtrain.tasks import review
from qtrain.utils.errors import ConfigError
from tests.helpers.wandb_server import WandbServer


def run(folder: Path, *overrides: str) -> dict[str, Any]:
    return review.run(compose(["task=review", f"output={folder}", *overrides]))


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    folder = tmp_path / "bits"
    for number in range(2):
        knobs = {"lr": 0.1} if number else {"widths.fc": 4}
        append_trial(folder, Trial(id=str(number), key=str(number), status="finished", knobs=knobs))
    (folder / "sweep.yaml").write_text("experiment: cifar10/sweep_bits\nname: null\n")
    return folder


def panels(section: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Kind of a panel -> the configs of those of that kind, of the definition's ``section``."""
    found: dict[str, list[dict[str, Any]]] = {}
    for bank in section["panelBankConfig"]["sections"]:
        for panel in bank["panels"]:
            found.setdefault(panel["viewType"], []).append(panel["config"])
    return found


def test_without_a_server_the_definition_is_written(wandb_client: None, sweep: Path, tmp_path: Path) -> None:
    metrics = run(tmp_path, f"review.folder={sweep}", "review.project=mine")
    assert metrics["url"] is None
    view = json.loads(Path(metrics["workspace"]).read_text())
    assert (view["project"], view["displayName"]) == ("mine", "qtrain: cifar10/sweep_bits")
    section = view["spec"]["section"]
    (runs,) = section["runSets"]
    assert [(f["key"], f["op"], f["value"]) for f in runs["filters"]["filters"]] == [
        ({"section": "run", "name": "group"}, "=", "cifar10/sweep_bits")
    ]
    shown = panels(section)
    assert [(plot["xAxis"], plot["yAxis"]) for plot in shown["Scatter Plot"]] == [
        (f"summary:{cost}", "summary:val_top1") for cost in ("compression", "bops", "size_bytes")
    ]
    (coordinates,) = shown["Parallel Coordinates Plot"]
    assert [column["accessor"] for column in coordinates["columns"]] == [
        "config:knobs.value.widths_fc", "config:knobs.value.lr", "summary:size_bytes", "summary:bops",
        "summary:val_top1",
    ]  # fmt: skip
    assert shown["Parameter Importance"][0]["targetKey"] == "val_top1"
    lines = {(tuple(plot["metrics"]), plot["xAxis"], plot.get("groupBy")) for plot in shown["Run History Line Plot"]}
    assert lines == {
        (("val/top1",), "epoch", None),
        (("val/top1",), "epoch", "group"),
        (("train/total",), "step", None),
        (("bits/weight",), "layer", None),
        (("bits/input",), "layer", None),
    }
    assert '"allocation"' in json.dumps(shown["Weave"]), "the table of layers"


def test_of_single_runs(wandb_client: None, tmp_path: Path) -> None:
    """No group, no knobs: all runs, by the bits that most of their layers have and by accuracy on the test images."""
    view = json.loads(Path(run(tmp_path)["workspace"]).read_text())
    (runs,) = view["spec"]["section"]["runSets"]
    assert runs["filters"]["filters"] == []
    (coordinates,) = panels(view["spec"]["section"])["Parallel Coordinates Plot"]
    assert [column["accessor"].partition(":")[2] for column in coordinates["columns"]] == [
        "w_bits", "a_bits", "size_bytes", "bops", "top1",
    ]  # fmt: skip


def test_it_is_saved_once_and_then_replaced(
    wandb_server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(tmp_path, "review.group=a")
    with monkeypatch.context() as offline:
        offline.setenv("WANDB_MODE", "offline")
        assert run(tmp_path, "review.group=c")["url"] is None
    second = run(tmp_path, "review.group=b")
    assert first["url"] == second["url"] and first["url"].startswith(f"{wandb_server.url}/local/qtrain")
    state = wandb_server.state()
    (view,) = state["views"]
    assert (view["entityName"], view["projectName"], view["displayName"]) == ("local", "qtrain", "qtrain: b")
    saved = json.loads(Path(second["workspace"]).read_text())
    assert saved["spec"] == view["spec"]
    assert state["unknown"] == []


def test_a_server_that_refuses(wandb_server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wandb_workspaces.workspaces import Workspace

    def refuse(self: Workspace) -> None:
        raise PermissionError("no rights\nin this project")

    monkeypatch.setattr(Workspace, "save", refuse)
    metrics = run(tmp_path)
    assert metrics["url"] is None and Path(metrics["workspace"]).is_file()


def test_a_folder_without_a_sweep(wandb_client: None, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"review\.folder: there is no sweep in"):
        run(tmp_path, f"review.folder={tmp_path}")
