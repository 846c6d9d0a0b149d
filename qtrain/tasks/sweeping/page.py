"""Floor 6: a sweep on one page."""

from __future__ import annotations

from pathlib import Path

PAGE = "sweep.html"


def write_sweep_report(folder: Path) -> Path:
    """``sweep.html``, its pictures, ``pareto.csv`` and ``front/`` in the sweep's ``folder``; the page's path."""
    raise NotImplementedError
