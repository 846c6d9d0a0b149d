"""Whether W&B can be used here: it is installed, switched on, has a key, and can be reached."""

import importlib.util
import netrc
import os
import ssl
import urllib.error
import urllib.request
from urllib.parse import urlsplit

MODES = ("online", "offline", "disabled")

API_KEY, MODE, BASE_URL = "WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"
"""The client's environment variables, which have the same meaning here."""


def wandb_mode(*, mode: str, host_timeout_s: float) -> tuple[str, str]:
    """What W&B can do here, and why: (``online`` | ``offline`` | ``disabled``, reason).

    Online needs a key (``WANDB_API_KEY`` or ``~/.netrc``) and a host that answers within ``host_timeout_s`` seconds;
    without a network, the client itself would try for 100 seconds. Raises ``ValueError`` for an unknown mode.
    """
    check_mode("wandb_mode", mode)
    if importlib.util.find_spec("wandb") is None:
        return "disabled", "wandb is not installed (pip install 'qtrain[wandb]')"
    if mode != "online":
        return mode, f"logger.wandb.mode={mode}"
    if os.environ.get(MODE) in ("offline", "disabled"):
        return os.environ[MODE], f"{MODE}={os.environ[MODE]}"
    host = urlsplit(server_url()).hostname or ""
    if not _has_key(host):
        return "offline", f"no key for {host} (set {API_KEY} or run `wandb login`)"
    if (reason := unreachable(host_timeout_s)) is not None:
        return "offline", reason
    return "online", f"{host} answers"


def check_mode(owner: str, mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"{owner}: mode must be one of {', '.join(MODES)}, got {mode!r}")


def server_url() -> str:
    """The server that ``WANDB_BASE_URL`` names, by default W&B's own."""
    return os.environ.get(BASE_URL) or "https://api.wandb.ai"


def unreachable(timeout_s: float) -> str | None:
    """Why the server does not answer within ``timeout_s`` seconds; ``None`` if it gives any answer.

    A connection alone does not count, since a server that hangs accepts connections too. Proxies of the environment are
    used, as by the client.
    """
    try:
        urllib.request.urlopen(server_url(), timeout=timeout_s).close()
    except urllib.error.HTTPError:
        return None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError):
            return None  # the server answered; the client accepts more certificates
        return f"{server_url()} does not answer ({reason})"
    return None


def _has_key(host: str) -> bool:
    if os.environ.get(API_KEY):
        return True
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
