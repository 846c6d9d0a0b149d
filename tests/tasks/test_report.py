"""The task that writes a report: of runs, or of a sweep."""

from __future__ import annotations

from pathlib import Path

import pytest

from qtrain.config.compose import compose
from qtrain.pipeline.summary import write_summary
from qtrain.tasks.report import run


def test_task_prints_the_table_and_where_the_page_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = dict(model="resnet8", w_bits=4, a_bits=4, distill="soft+hint", epochs=3, top1=96.75, seed=0)
    write_summary(tmp_path / "a", summary)
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "metrics.jsonl").write_text('{"step": 1}\n')
    metrics = run(compose(["task=report", f"report.folder={tmp_path}"]))
    assert metrics == {"report": str(tmp_path / "report.html"), "runs": 1, "unfinished": 1}
    printed = capsys.readouterr().out
    assert "distilled (soft+hint)" in printed and f"report: {tmp_path / 'report.html'}" in printed
