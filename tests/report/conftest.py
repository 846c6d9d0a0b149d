"""What tests of pages share: a browser, and an invented sweep to show in it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from qtrain.config.experiment_file import as_experiment
from qtrain.report.sweep_page import write_sweep_report
from qtrain.sweep.trial import Trial, append_trial

LAYERS = ["conv1", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "layer2.0.conv2", "fc"]


@dataclass(frozen=True)
class Shown:
    """What a browser made of a page: what the script that was run returned, and what the console said."""

    result: Any
    console: list[str]


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Shown]:
    """Opens a page in headless Chromium, runs ``script`` in it (the body of a function), returns what came of it.

    Without a Chromium the test is skipped, or fails if ``QTRAIN_REQUIRE_BROWSER=1``.
    """
    program = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
    )
    if not program:
        reason = "there is no Chromium; apt-get install chromium"
        if os.environ.get("QTRAIN_REQUIRE_BROWSER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    profile = tmp_path_factory.mktemp("browser")

    def show(page: Path, script: str = "return null", *, dark: bool = False, screenshot: Path | None = None) -> Shown:
        # A copy of the page with the script at its end; what it returns is read from the page as it then is. The page's
        # own clock runs ahead while there is work to do, so that the charts are drawn before the page is dumped.
        answer = f"""<script>addEventListener("load", async () => {{
          await drawn;
          const made = document.createElement("script");
          made.type = "application/json"; made.id = "answer";
          made.textContent = JSON.stringify(await (async () => {{ {script} }})()).replaceAll("<", "\\u003c");
          document.body.append(made); }});</script></body>"""
        copy = profile / "page.html"
        before, _, after = page.read_text(encoding="utf-8").rpartition("</body>")
        copy.write_text(before + answer + after, encoding="utf-8")
        wanted = [f"--screenshot={screenshot}"] if screenshot else ["--dump-dom"]
        done = subprocess.run(
            [program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
             f"--user-data-dir={profile / 'user'}", "--window-size=1400,1600", "--enable-logging=stderr",
             "--virtual-time-budget=20000",
             f"--blink-settings=preferredColorScheme={0 if dark else 1}", *wanted, copy.as_uri()],
            capture_output=True, text=True, timeout=240, check=True,
        )  # fmt: skip
        console = re.findall(r":CONSOLE[:(]\d+\)?\] (.*)", done.stderr)
        found = re.search(r'id="answer">(.*?)</script>', done.stdout, flags=re.DOTALL)
        assert screenshot or found, f"the script did not come to its end: {console}"
        return Shown(json.loads(found[1]) if found else None, console)

    return show


@pytest.fixture
def sweep_folder(tmp_path: Path) -> Path:
    """A sweep of six: two on the front, one beaten, one stopped, one failed, one duplicate."""
    return make_sweep(tmp_path / "a sweep")


@pytest.fixture(scope="session")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with its page and pictures, which take seconds; to be looked at only."""
    folder = make_sweep(tmp_path_factory.mktemp("swept") / "a sweep")
    write_sweep_report(folder, as_experiment=as_experiment)
    return folder


def make_sweep(folder: Path) -> Path:
    folder.mkdir()
    config = {
        "experiment": "sweep_quickstart",
        "seed": 0,
        "fit": {"epochs": 3},
        "sweep": {
            "space": {"widths": {"_target_": "qtrain.sweep.bit_widths.BitWidths"}, "optimizer.lr": [1e-3, 1e-2],
                      "objective": ["hard", "soft"]},
            "objectives": {"top1": "max", "size_bytes": "min", "loss": None},
        },
        "overrides": ["task=sweep", "+experiment=sweep_quickstart"],
    }  # fmt: skip
    (folder / "sweep.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    for trial in TRIALS:
        append_trial(folder, trial)
        if trial.status in ("finished", "stopped"):
            rows = [
                {
                    "step": 9 * (e + 1),
                    "epoch": e,
                    "split": "val",
                    "top1": trial.metrics["top1"] - 2 * (trial.epochs - e - 1),
                }
                for e in range(int(trial.epochs))
            ]
            run = folder / "trials" / trial.key
            run.mkdir(parents=True)
            (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def invented(number: int, *, bits: tuple[int, int], top1: float | None, **changes: Any) -> Trial:
    """A trial with ``bits`` in its two blocks; its cost follows from them."""
    widths = {layer: [b, b] for layer, b in zip(LAYERS, (8, bits[0], bits[0], bits[1], bits[1], 8), strict=True)}
    metrics = {"size_bytes": 1000.0 * sum(bits), "bops": 1e6 * (bits[0] ** 2 + bits[1] ** 2)}
    knobs = {"widths.layer1.0": bits[0], "widths.layer2.0": bits[1], "optimizer.lr": 1e-3, "objective": "soft"}
    overrides = ["+experiment=quickstart", "task=train", "variants=null", "fit.final_test=false",
                 "optimizer.lr=0.001", "objective=soft", f"quantize.bits.weight={bits[0]}"]  # fmt: skip
    fields: dict[str, Any] = dict(
        id=f"{number:04d}", key=f"{number:012x}", status="finished", epochs=3, knobs=knobs, layer_bits=widths,
        overrides=overrides, metrics=metrics | ({} if top1 is None else {"top1": top1}), train_s=30.0, overhead_s=0.25,
        images={"val": 360, "test": 1200}, started=1000.0 * number, ended=1000.0 * number + 40, threads=1,
    )  # fmt: skip
    return Trial(**(fields | changes))


TRIALS = [
    invented(1, bits=(4, 4), top1=96.5),
    invented(2, bits=(4, 2), top1=90.25, peak_bytes=1_640_000_000),
    invented(3, bits=(3, 4), top1=88.0),
    invented(4, bits=(2, 2), top1=70.0, status="stopped", epochs=1, reason="by the scheduler"),
    invented(5, bits=(2, 3), top1=None, status="failed", epochs=1,
             reason="StopOnNonFinite: the loss is <nan> at step 7; lower optimizer.lr"),
    invented(6, bits=(4, 4), top1=96.5, status="duplicate", epochs=0, of="0001", train_s=0.0, overhead_s=0.0),
]  # fmt: skip
