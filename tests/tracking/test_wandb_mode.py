"""Whether W&B can be logged to: found out soon, and said."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from qtrain.tracking import wandb_mode as module
from qtrain.tracking.wandb_mode import unreachable, wandb_mode
from tests.helpers.wandb_server import KEY, WandbServer


@pytest.fixture
def no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: object())


def test_wandb_mode_is_offline_without_a_key(no_key: None) -> None:
    mode, reason = wandb_mode(mode="online", host_timeout_s=0.1)
    assert mode == "offline" and "no key for api.wandb.ai" in reason


def test_wandb_mode_is_offline_soon_without_a_server(no_key: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:  # bound but not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        mode, reason = wandb_mode(mode="online", host_timeout_s=0.5)
    assert mode == "offline" and "does not answer (" in reason and "refused" in reason


def test_wandb_mode_is_offline_with_a_server_that_does_not_answer(
    no_key: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        mode, reason = wandb_mode(mode="online", host_timeout_s=0.2)
    assert mode == "offline" and "timed out" in reason


def test_wandb_mode_is_online_with_a_server_that_answers(no_key: None, monkeypatch: pytest.MonkeyPatch) -> None:
    server = WandbServer()
    try:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        netrc = Path(os.environ["HOME"]) / ".netrc"
        netrc.write_text("machine 127.0.0.1\n  login user\n  password key\n")
        netrc.chmod(0o600)
        assert wandb_mode(mode="online", host_timeout_s=5.0)[0] == "online"
        for asked in ("offline", "disabled"):
            monkeypatch.setenv("WANDB_MODE", asked)
            assert wandb_mode(mode="online", host_timeout_s=5.0)[0] == asked
            assert wandb_mode(mode="disabled", host_timeout_s=5.0)[0] == "disabled"
    finally:
        server.kill()


def test_wandb_mode_counts_an_http_error_as_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(url: str, timeout: float) -> None:
        raise module.urllib.error.HTTPError(url, 403, "forbidden", {}, None)  # type: ignore[arg-type]

    monkeypatch.setattr(module.urllib.request, "urlopen", refuse)
    assert unreachable(1.0) is None


def test_wandb_mode_is_disabled_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    mode, reason = wandb_mode(mode="online", host_timeout_s=1.0)
    assert mode == "disabled" and "not installed" in reason


def test_wandb_mode_refuses_an_unknown_mode() -> None:
    with pytest.raises(ValueError, match="must be one of online, offline, disabled, got 'ofline'"):
        wandb_mode(mode="ofline", host_timeout_s=1.0)
