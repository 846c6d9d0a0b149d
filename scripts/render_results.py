"""Writes the tables of README and docs from the rows in ``results/``, so that no number is ever typed.

    python scripts/render_results.py             # README.md, docs/*.md and qtrain/report/recorded.csv, in place
    python scripts/render_results.py --check     # exit code 1 where a table is not what its rows say

A table stands between ``<!-- results:NAME KIND -->`` and ``<!-- /results -->`` and is made of ``results/NAME.csv``, by
the function ``KIND`` of ``result_tables``; without a kind it is the closing table of runs. Of several rows of one
configuration the last counts; seeds are averaged. A file that is not there yet gives no table.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from result_tables import KINDS
from result_tables.variant import summary_of

from qtrain.pipeline.results import read_results
from qtrain.report.teacher_gain import RECORDED, recorded_of, recorded_text

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(
    r"(<!-- results:(?P<name>[\w-]+)(?: (?P<kind>[\w-]+))? -->\n)(?P<table>.*?)(<!-- /results -->)", re.DOTALL
)
WITH_GAINS = ("quickstart",)
"""Experiments whose gain by a teacher the package shows; their rows are in the file of that name."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 where a table is out of date")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of the CSV files")
    parser.add_argument("files", nargs="*", type=Path, help="Markdown files; default: README.md and docs/*.md")
    options = parser.parse_args(arguments)
    stale = []
    if not options.files and (text := recorded(options.results)) != RECORDED.read_text(encoding="utf-8"):
        stale.append(RECORDED)
        if not options.check:
            RECORDED.write_text(text, encoding="utf-8")
            print(f"rendered {RECORDED}")
    for path in options.files or [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        before = path.read_text(encoding="utf-8")
        after = render(before, options.results)
        if after != before:
            stale.append(path)
            if not options.check:
                path.write_text(after, encoding="utf-8")
                print(f"rendered {path}")
    if options.check and stale:
        names = ", ".join(str(path) for path in stale)
        print(f"{names}: tables differ from results/; run python scripts/render_results.py", file=sys.stderr)
    return int(options.check and bool(stale))


def recorded(results: Path) -> str:
    """The content of the file with the gains that the package shows: of each experiment with rows of several seeds."""
    found = []
    for name in WITH_GAINS:
        rows = read_results(file) if (file := results / f"{name}.csv").is_file() else []
        runs = [summary for row in rows if (summary := summary_of(row)) is not None]
        found += recorded_of(name, runs, (row["commit"] for row in rows)) if runs else []
    return recorded_text(found)


def render(text: str, results: Path) -> str:
    """``text`` with every table made anew from the CSV files in ``results``."""
    opened, whole = text.count("<!-- results:"), len(BLOCK.findall(text))
    if opened != whole:
        raise ValueError(
            f"render_results: {opened} tables are opened and {whole} are whole; "
            "write <!-- results:NAME --> and <!-- /results --> on lines of their own"
        )

    def table(match: re.Match[str]) -> str:
        path = results / f"{match['name']}.csv"
        if (made := KINDS.get(match["kind"])) is None:
            known = ", ".join(sorted(filter(None, KINDS)))
            raise ValueError(f"render_results: there is no table {match['kind']!r}; there are {known}")
        try:
            return match[1] + (made(read_results(path)) if path.is_file() else "") + match[5]
        except ValueError as error:
            raise ValueError(f"render_results: {path.name}: {error}") from error

    return BLOCK.sub(table, text)


if __name__ == "__main__":
    sys.exit(main())
