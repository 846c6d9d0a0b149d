"""The quickstart's students with the fewest bits over ten seeds, with and without teacher: ``results/quickstart.csv``.

    python scripts/quickstart_seeds.py

One run after the other, on one thread. Each seed trains its own full-precision networks. Runs that have a row are not
repeated, and one that was interrupted goes on. Ten seeds take about ten minutes of one core.
"""

import argparse
from pathlib import Path

import torch

from qtrain.config.compose import compose
from qtrain.pipeline.results import read_results
from qtrain.pipeline.train import train

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = ("w2a2", "w2a2-distill")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "quickstart.csv")
    parser.add_argument("--output", type=Path, default=Path("outputs/quickstart_seeds"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for seed in range(options.seeds):
        for variant in VARIANTS:
            common = [
                "+experiment=quickstart",
                f"seed={seed}",
                f"output={options.output}",
                f"results={options.results}",
            ]
            own = compose(common).variants[variant]
            settings = compose([*common, *own, "variants=null", f"name={variant}-seed{seed}"])
            rows = read_results(options.results) if options.results.is_file() else []
            if settings.identity not in {row["config_hash"] for row in rows}:
                train(settings)


if __name__ == "__main__":
    main()
