"""The folder of a sweep: which command may have it."""

from __future__ import annotations

from pathlib import Path

import pytest

from qtrain.config.compose import compose
from qtrain.sweep.search_log import SEARCH
from qtrain.sweep.trial_store import TrialStore
from qtrain.utils.errors import ConfigError

KNOBS = ["task=sweep", "+sweep.space.seed=[0,1]"]


def claim(folder: Path, *own: str) -> None:
    overrides = [*KNOBS, *own]
    with TrialStore.of(compose(overrides), overrides, folder):
        pass


def test_a_sweep_that_never_asked_for_a_trial_does_not_block_its_folder(tmp_path: Path) -> None:
    claim(tmp_path)
    claim(tmp_path, "fit.epochs=7")
    (tmp_path / SEARCH).write_text("")
    claim(tmp_path, "fit.epochs=7")
    with pytest.raises(ConfigError, match="holds a sweep of another config"):
        claim(tmp_path)
    claim(tmp_path, "overwrite=true")
    assert not (tmp_path / SEARCH).exists()
