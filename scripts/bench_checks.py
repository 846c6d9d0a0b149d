"""Runs the checks of a fresh clone, one after the other, and writes their seconds and the package's lines as rows.

    python scripts/bench_checks.py [--targets lint types tests test-slow slurm] [--results results/checks.csv]

The clone is of the commit that is checked out here, in a temporary folder, and uses this environment. Nothing else
should run on the machine meanwhile. The first target that fails ends the script with its exit code.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from qtrain.pipeline.results import append_row, provenance

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ("lint", "types", "tests", "test-slow", "slurm")


def lines_of(package: Path) -> int:
    """Lines of all Python files below ``package``."""
    return sum(len(path.read_bytes().splitlines()) for path in package.rglob("*.py"))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "checks.csv")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder, "checkout")
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        # The stamp says that this environment has all that the tests need; the clone's own package comes first.
        (clone / ".venv").symlink_to(Path(sys.prefix))
        data = {} if "QTRAIN_TEST_DATA" in os.environ else {"QTRAIN_TEST_DATA": str(ROOT.parent / "shared" / "data")}
        environment = {**os.environ, **data, "PYTHONPATH": str(clone)}
        notes = f"{lines_of(clone / 'qtrain')} lines in qtrain/, two workers"
        for target in options.targets:
            start = time.perf_counter()
            done = subprocess.run(["make", "-o", ".venv/.installed-test", target], cwd=clone, env=environment)
            seconds = time.perf_counter() - start
            if done.returncode:
                return done.returncode
            row = {"experiment": "checks", "task": f"make {target}", "wall_s": seconds, "notes": notes}
            append_row(options.results, {**provenance(), **row})
            print(f"make {target}: {seconds:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
