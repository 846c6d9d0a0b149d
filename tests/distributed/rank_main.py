"""One rank of a test: trains each config of a list, one after the other, in one process group.

``python rank_main.py JOBS``: a JSON file, a list of ``{"overrides": [...]}``. Each run that ends leaves what
``train.run`` leaves; one that is refused leaves ``refused-<rank>.txt`` in its folder, and the next one is tried.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from pytorch_lightning.utilities import rank_zero_only

from qtrain.config.compose import compose
from qtrain.tasks import train


def main(jobs: Path) -> None:
    torch.set_num_threads(1)
    ranks = int(os.environ["WORLD_SIZE"])
    if ranks > 1:
        # Before Lightning does it: ranks must meet also where every config fails before its fit.
        dist.init_process_group("gloo")
    for job in json.loads(jobs.read_text()):
        cfg = compose([*job["overrides"], f"trainer.devices={ranks}", "trainer=cpu"])
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                train.run(cfg)
        except Exception:
            folder = Path(cfg.run_dir)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"refused-{os.environ['RANK']}.txt").write_text(traceback.format_exc())
    if ranks > 1:
        dist.destroy_process_group()


def as_rank(rank: int, ranks: int, port: int, overrides: list[str], log: Path) -> None:
    """Be rank ``rank`` of the one run ``overrides``, in this process; what it says goes to ``log``."""
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "RANK": str(rank),
        "LOCAL_RANK": str(rank), "NODE_RANK": "0", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    torch.set_num_threads(1)
    rank_zero_only.rank = rank  # which it reads from the environment when it is imported
    with log.open("a") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        train.run(compose(overrides))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
