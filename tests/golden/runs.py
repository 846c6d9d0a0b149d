"""Short runs of every kind in 64 bits, and what stores the loss of each of their steps.

    python -m tests.golden.runs            # after a change that is meant to change what is trained: writes losses.json

What is typed in ``RUNS`` may be renamed with the code; the losses stay. In 64 bits they agree on all processors to far
better than the test asks for, hence one file serves all.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pytorch_lightning.utilities import rank_zero_only
from safetensors.numpy import load_file, save_file
from sklearn.datasets import load_digits

from qtrain.config.compose import compose
from qtrain.run_task import run_task
from tests.golden.wide_sums import WideSums

STORED = Path(__file__).with_name("losses.json")

SMALL = """
    trainer=cpu fit.precision=64-true model=cifar_resnet8 model.width=0.25 data.batch_size=16 data.max_train=64
    fit.epochs=2 fit.log_every_steps=1 fit.health_every_steps=0 fit.reestimate_bn=0 fit.final_test=false
    quantize.calibration_batches=2 optimizer.lr=0.02 fit.scale_lr=0.02
    granularity@quantize.weight.granularity=tensor
""".split()
SOFT = ["teacher=self", "objective=soft"]
PICTURES = """
    data=imagefolder data.root=$FOLDER/pictures data.image_size=12 data.workers=0 data.crop=random_resized
    data.crop_pct=0.875 data.flip=true data.channels=3
""".split()
SYNTHETIC = """
    data=synthetic data@data.test=digits data.image_size=8 data.in_channels=1 data.crop_padding=1 data.flip=false
    data.test.mean=[0.3] data.test.std=[0.37] data.max_train=null synthesis=bn_statistics synthesis.batch_size=8
    synthesis.steps=4 synthesis.shift=1 synthesis.flip=false synthesize.images=32 synthesize.workers=1
    synthesize.folder=$FOLDER/synthetic teacher=self objective=kl fit.epochs=3
""".split()
STAGES = [
    "+stages.wide=['quantize.bits.weight=8','quantize.bits.input=8','fit.share=0.25']",
    "+stages.falling=['+callback@callbacks.bits=bits','fit.share=0.5']",
    "+stages.frozen=['fit.freeze.layers=[layer1*]','fit.share=0.25']",
]
CACHED = [*SOFT, "teacher_cache=full", "teacher.cache.folder=$FOLDER/answers"]

RUNS: dict[str, list[str]] = {
    "resident": [],
    "streaming": [],
    "distilled": SOFT,
    "cached": CACHED,
    "replayed": CACHED,
    "stages": STAGES,
    "data-free": SYNTHETIC,
    "two-ranks": ["trainer.devices=2", *SOFT],
}


IMAGES = {"streaming": PICTURES}
"""Runs of other images than the digits in memory."""
AFTER = {"replayed": "cached"}
"""Runs that need what another leaves."""


def losses_of(name: str, folder: Path) -> list[float]:
    """The loss of each step of a run, which writes below ``folder``, as do those that it is based on."""
    if name in AFTER and not list(folder.glob(f"*/{AFTER[name]}/summary.json")):
        losses_of(AFTER[name], folder)
    images = _placed(IMAGES.get(name, []), folder)
    if images:
        make_pictures(folder / "pictures")
    weights = make_weights(folder / ("pictures" if images else "digits"), images)
    own = _placed(RUNS[name], folder)
    overrides = [*SMALL, *images, *own, f"model.weights={weights}", f"output={folder}", f"name={name}"]
    ranks = next((int(word.partition("=")[2]) for word in own if word.startswith("trainer.devices=")), 1)
    if ranks == 1:
        train(overrides)
    else:
        on_ranks(ranks, train, overrides)
    (rows,) = folder.glob(f"*/{name}/metrics.jsonl")
    return [row["total"] for row in map(json.loads, rows.read_text().splitlines()) if "total" in row]


def train(overrides: Sequence[str]) -> None:
    """One command, on one thread, the same on every processor."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with contextlib.redirect_stdout(io.StringIO()), WideSums():
            run_task(compose(overrides), overrides)
    finally:
        torch.set_num_threads(threads)


def _placed(words: Sequence[str], folder: Path) -> list[str]:
    return [word.replace("$FOLDER", str(folder)) for word in words]


def make_weights(folder: Path, images: Sequence[str]) -> Path:
    """Weights that follow from their names and shapes; these come from a model that learned nothing."""
    path = folder / "weights.safetensors"
    if not path.is_file():
        untrained = ["quantize.enabled=false", "optimizer.lr=0", "data.max_train=16", "fit.epochs=1", "name=untrained"]
        train([*SMALL, *images, *untrained, f"output={folder}"])
        (student,) = folder.glob("*/untrained/student.safetensors")
        generator = np.random.default_rng(0)
        state = {}
        for name, tensor in sorted(load_file(student).items()):
            if tensor.ndim > 0:
                state[name] = generator.uniform(*_range(name, tensor), tensor.shape).astype(np.float32)
            else:
                state[name] = tensor
        save_file(state, path)
    return path


def _range(name: str, tensor: np.ndarray) -> tuple[float, float]:
    """Where values lie. None is 0 or 1: sums of codes would then hit a mean, and ReLU's edge, exactly or almost."""
    if tensor.ndim > 1:
        bound = (6 / tensor[0].size) ** 0.5
        return -bound, bound
    return (0.5, 1.5) if name.endswith(("weight", "running_var")) else (-0.5, 0.5)


def make_pictures(root: Path) -> None:
    digits = load_digits()
    for number in range(80):
        folder = root / ("val" if number >= 60 else "train") / str(digits.target[number])
        folder.mkdir(parents=True, exist_ok=True)
        gray = Image.fromarray((digits.images[number] * 15).astype(np.uint8))
        gray.resize((16, 16), Image.Resampling.NEAREST).save(folder / f"{number:02d}.png")


def on_ranks(ranks: int, work: Callable[[Sequence[str]], None], overrides: Sequence[str]) -> None:
    """``work`` in ``ranks`` processes that find each other."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    processes = [context.Process(target=_as_rank, args=(rank, ranks, port, work, overrides)) for rank in range(ranks)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(timeout=300)
    finally:
        for process in processes:
            process.kill()
    assert [process.exitcode for process in processes] == [0] * ranks


def _as_rank(rank: int, ranks: int, port: int, work: Callable[[Sequence[str]], None], overrides: Sequence[str]) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "RANK": str(rank),
        "LOCAL_RANK": str(rank), "NODE_RANK": "0", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    rank_zero_only.rank = rank  # which it reads from the environment when it is imported
    work(overrides)


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        losses = {name: losses_of(name, Path(folder)) for name in RUNS}
    STORED.write_text(json.dumps(losses, indent=1) + "\n")
    print(f"{STORED}: {sum(map(len, losses.values()))} losses of {len(losses)} runs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
