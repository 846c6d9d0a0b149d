"""Fixtures of the tests of tasks."""

from tests.helpers.calibrated_run import run_folder

__all__ = ["run_folder"]
