"""Floor 5: whether W&B can be logged to from here: installed, wanted, with a key, and reachable."""

from __future__ import annotations

import importlib.util
import netrc
import os
import socket
from urllib.parse import urlsplit

MODES = ("online", "offline", "disabled")

API_KEY, MODE, BASE_URL = "WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"
"""The client's environment variables that count here as they do there."""


def wandb_mode(*, mode: str, host_timeout_s: float) -> tuple[str, str]:
    """What W&B can do here, and why: (``online`` | ``offline`` | ``disabled``, reason).

    Online needs a key (``WANDB_API_KEY`` or ``~/.netrc``) and a host that accepts a connection within
    ``host_timeout_s`` seconds; the client's own attempt would hold a run without a network for 100 seconds.
    Raises ``ValueError`` for a mode that there is not.
    """
    check_mode("wandb_mode", mode)
    if importlib.util.find_spec("wandb") is None:
        return "disabled", "wandb is not installed (pip install 'qtrain[wandb]')"
    if mode != "online":
        return mode, f"logger.wandb.mode={mode}"
    if os.environ.get(MODE) in ("offline", "disabled"):
        return os.environ[MODE], f"{MODE}={os.environ[MODE]}"
    host, port = server_address()
    if not _has_key(host):
        return "offline", f"no key for {host} (set {API_KEY} or run `wandb login`)"
    if (reason := unreachable(host_timeout_s)) is not None:
        return "offline", reason
    return "online", f"{host}:{port} is reachable"


def check_mode(owner: str, mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"{owner}: mode must be one of {', '.join(MODES)}, got {mode!r}")


def server_address() -> tuple[str, int]:
    """Host and port of the server that ``WANDB_BASE_URL`` names; W&B's own without it."""
    url = urlsplit(os.environ.get(BASE_URL) or "https://api.wandb.ai")
    return url.hostname or "api.wandb.ai", url.port or (80 if url.scheme == "http" else 443)


def unreachable(timeout_s: float) -> str | None:
    """Why the server accepts no connection within ``timeout_s`` seconds; ``None`` where it does."""
    host, port = server_address()
    try:
        socket.create_connection((host, port), timeout=timeout_s).close()
    except OSError as error:
        return f"{host}:{port} is not reachable ({error})"
    return None


def _has_key(host: str) -> bool:
    if os.environ.get(API_KEY):
        return True
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
