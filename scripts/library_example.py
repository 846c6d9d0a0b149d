"""Runs README's lines for the library at several bit widths and writes the accuracies to ``results/library.csv``.

    python scripts/library_example.py [--seeds 3] [--results results/library.csv]

The network and the images are those of ``scripts/shop.py``. Each row has the accuracy in full precision, after
calibration, and of the trained student loaded from its file; with the teacher and without it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import shop

import qtrain
from qtrain.pipeline.results import append_row, provenance

ROOT = Path(__file__).resolve().parent.parent
EPOCHS = 3
NOTES = "qtrain.quantize, distill, save, load; 597 validation images; accuracy of the loaded file"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "library.csv")
    options = parser.parse_args()
    for seed in range(options.seeds):
        model = shop.trained(seed=seed)
        for bits in (4, 2):
            for teacher in (None, model):
                start = time.perf_counter()
                student = qtrain.quantize(model, shop.train_loader, weight_bits=bits, input_bits=bits, seed=seed)
                calibrated = shop.top1(student)
                cost = qtrain.cost(student, next(iter(shop.val_loader))[0])
                qtrain.distill(student, shop.train_loader, teacher=teacher, epochs=EPOCHS, seed=seed)
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder, "student.safetensors")
                    size = qtrain.save(student, path, builder=shop.Net)
                    loaded = qtrain.load(path, builders=[shop.Net])
                row = {
                    **provenance(),
                    "experiment": "library",
                    "task": "train",
                    "dataset": "digits",
                    "model": "shop.Net",
                    "quantizer": "lsq",
                    "w_bits": bits,
                    "a_bits": bits,
                    "distill": "none" if teacher is None else "soft",
                    "seed": seed,
                    "epochs": EPOCHS,
                    "top1": shop.top1(loaded),
                    "fp_top1": shop.top1(model),
                    "ptq_top1": calibrated,
                    "size_bytes": cost.size_bytes,
                    "fp_size_bytes": cost.fp_size_bytes,
                    "test_images": len(shop.val_loader.dataset),  # type: ignore[arg-type]
                    "effective_bits": cost.effective_bits,
                    "bops": cost.bops,
                    "fp_bops": cost.fp_bops,
                    "compression": cost.compression,
                    "file_bytes": size.file_bytes,
                    "wall_s": time.perf_counter() - start,
                    "notes": NOTES,
                }
                append_row(options.results, row)
                print(
                    f"seed {seed}, W{bits}A{bits}, {row['distill']}: {row['top1']:.2f} %, calibrated {calibrated:.2f} %"
                )


if __name__ == "__main__":
    main()
