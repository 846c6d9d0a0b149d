"""Whether the Hugging Face hub answers, found out in seconds.

Its client retries for most of a minute before it says that there is no network; models and datasets ask here first.
"""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub.constants

log = logging.getLogger(__name__)


@contextmanager
def offline_unless_reachable(*libraries: Any) -> Iterator[None]:
    """Inside, the hub's client uses its cache alone if the hub does not answer.

    ``libraries`` are further modules with an ``HF_HUB_OFFLINE`` of their own that has to follow.
    """
    modules = (huggingface_hub.constants, *libraries)
    if huggingface_hub.constants.HF_HUB_OFFLINE or hub_reachable():
        yield
        return
    log.warning("%s does not answer within 3 s; only the cache is used", huggingface_hub.constants.ENDPOINT)
    before = [module.HF_HUB_OFFLINE for module in modules]
    for module in modules:
        module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value


def hub_reachable() -> bool:
    """Whether the hub's host accepts a connection; a proxy hides this, and the answer is then yes."""
    if any(os.environ.get(key) for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    url = urlsplit(huggingface_hub.constants.ENDPOINT)
    port = url.port or (443 if url.scheme == "https" else 80)
    try:
        with socket.create_connection((url.hostname or "", port), timeout=3):
            return True
    except OSError:
        return False
