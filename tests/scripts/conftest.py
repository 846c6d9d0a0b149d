"""Fixtures of the tests of scripts."""

from tests.helpers.calibrated_run import run_folder

__all__ = ["run_folder"]
