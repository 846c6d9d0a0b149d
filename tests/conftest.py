"""Fixtures that all tests share."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from tests.helpers.wandb_server import WandbServer

ROOT = Path(__file__).resolve().parent.parent

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test waits for a network
os.environ.setdefault("WANDB_MODE", "disabled")
# The same examples each time, and no complaint that a busy machine took long for one.
settings.register_profile("qtrain", deadline=None, derandomize=True)
settings.load_profile("qtrain")


@pytest.fixture(scope="session", autouse=True)
def yaml_files_parsed_once() -> Iterator[None]:
    """Hydra reads each YAML file once a session, unless the file changes: a third of what it takes to compose."""
    from hydra._internal.sources_registry import SourcesRegistry
    from hydra.core.plugins import Plugins
    from hydra.plugins.config_source import ConfigResult, ConfigSource

    Plugins.instance()  # which registers the sources, of classes of its own
    files = SourcesRegistry.instance().resolve("file")
    parsed: dict[tuple[str, int, int], ConfigResult] = {}
    read = files.load_config

    def load_config(source: ConfigSource, config_path: str) -> ConfigResult:
        file = Path(source.path, source._normalize_file_name(config_path))
        if not file.is_file():
            return read(source, config_path)  # which says that there is none
        key = str(file), file.stat().st_mtime_ns, file.stat().st_size
        if key not in parsed:
            parsed[key] = read(source, config_path)
        return copy.deepcopy(parsed[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "load_config", load_config)
        yield


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with real data (``cifar10/``, ``weights/``): ``QTRAIN_TEST_DATA``, or ``../shared/data``.

    Where there is none the test is skipped, or fails if ``QTRAIN_REQUIRE_DATA=1``.
    """
    folder = Path(os.environ.get("QTRAIN_TEST_DATA") or ROOT.parent / "shared" / "data")
    if folder.is_dir():
        return folder
    reason = f"no real data at {folder}; set QTRAIN_TEST_DATA to a folder with cifar10/ and weights/"
    if os.environ.get("QTRAIN_REQUIRE_DATA") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture
def wandb_client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """W&B's real client as on a machine that has never seen it: no key, no settings, no server."""
    wandb = pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    yield
    wandb.teardown()  # the next test has another server


@pytest.fixture
def wandb_server(wandb_client: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    """A W&B server on this machine, which the client finds and has a key for."""
    from tests.helpers.wandb_server import WandbServer

    server = WandbServer()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    yield server
    server.kill()
