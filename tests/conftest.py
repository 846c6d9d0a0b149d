"""Fixtures that all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test waits for a network
os.environ.setdefault("WANDB_MODE", "disabled")
# The same examples each time, and no complaint that a busy machine took long for one.
settings.register_profile("qtrain", deadline=None, derandomize=True)
settings.load_profile("qtrain")


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
