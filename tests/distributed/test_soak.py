"""Twenty kills at random moments in one run on two ranks: it ends as one that was left alone, bit for bit."""

from __future__ import annotations

import json
import multiprocessing
import random
import socket
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import torch

from qtrain.tracking.loggers import WALL_CLOCK_FIELDS
from tests.distributed.rank_main import as_rank
from tests.distributed.ranks import student_of

KILLS, RANKS = 20, 2

OVERRIDES = [
    "data=digits", "data.batch_size=48", "data.max_train=192", "data.max_test=60", "data.crop_padding=1",
    "model=cifar_resnet8", "teacher=self", "objective=soft", "+quantizer@quantize.weight_wrapper=quant_noise",
    "quantize.calibration_batches=1", "fit.epochs=16", "fit.log_every_steps=1", "fit.health_every_steps=0",
    "fit.checkpoint_every_steps=1", "fit.reestimate_bn=2", "fit.weight_average=0.9", "full_precision.epochs=1",
    "name=run", "trainer=cpu",
]  # fmt: skip
"""Augmentation, dropped quantization, a teacher and a weight average: whatever could be lost between two lives."""


def life(folder: Path, cache: Path) -> list[ForkServerProcess]:
    """Two ranks of the run in ``folder``, begun or gone on with, without what importing takes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed.rank_main"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    overrides = [*OVERRIDES, f"output={folder}", f"full_precision.folder={cache}", f"trainer.devices={RANKS}"]
    ranks = [
        context.Process(target=as_rank, args=(rank, RANKS, port, overrides, folder / f"{rank}.log"))
        for rank in range(RANKS)
    ]
    for process in ranks:
        process.start()
    return ranks


def end(ranks: list[ForkServerProcess]) -> list[int | None]:
    for process in ranks:
        process.join(300)
    return [process.exitcode for process in ranks]


def rows(folder: Path) -> int:
    metrics = folder / "adhoc" / "run" / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.is_file() else 0


@pytest.mark.slow
def test_twenty_random_kills_change_nothing(tmp_path: Path) -> None:
    cache, left_alone, killed = tmp_path / "cache", tmp_path / "left_alone", tmp_path / "killed"
    for folder in (left_alone, killed):
        folder.mkdir()
    assert end(life(left_alone, cache)) == [0, 0], (left_alone / "0.log").read_text()[-3000:]

    draw, finished_too_soon = random.Random(0), 0
    for kill in range(KILLS):
        ranks, before = life(killed, cache), rows(killed)
        at_least = before + draw.randint(0, 2)
        while rows(killed) <= at_least and all(process.is_alive() for process in ranks):
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.2))
        victim = draw.choice(ranks)
        finished_too_soon += not all(process.is_alive() for process in ranks)
        victim.kill()
        victim.join()
        for process in ranks:  # as whoever started them does
            process.kill()
        end(ranks)
        assert not (killed / "adhoc" / "run" / "summary.json").exists(), f"over after {kill} kills; give it more epochs"
    assert finished_too_soon == 0, (killed / "0.log").read_text()[-3000:]

    assert end(life(killed, cache)) == [0, 0], (killed / "0.log").read_text()[-3000:]
    expected, found = student_of(left_alone / "adhoc" / "run"), student_of(killed / "adhoc" / "run")
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    assert metrics(left_alone) == metrics(killed)


def metrics(folder: Path) -> list[dict[str, float]]:
    """What the run logged, without what the clock says."""
    text = (folder / "adhoc" / "run" / "metrics.jsonl").read_text()
    logged = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in row.items() if k not in WALL_CLOCK_FIELDS} for row in logged]
