"""Fixtures that tests of conversion share."""

from tests.helpers.settled import settle

__all__ = ["settle"]
